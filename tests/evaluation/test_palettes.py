"""Realised levels by hand, verdicts, the closed loop, tables and figures of palettes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from equipoise.evaluation.palette_figures import asked_figure, distributions_figure, radar_figure, reachable_figure, region_figure
from equipoise.evaluation.palette_text import applied_table, palette_table
from equipoise.evaluation.palettes import applied_figures, palette_figures
from equipoise.evaluation.realised import closed_loop, realised_levels, target_misses, verdict
from equipoise.palette.banks import Bank
from equipoise.palette.confidence import Monitor
from equipoise.palette.explore import explore
from equipoise.palette.quote import as_json, problem_of, quote

NAN, NONE = float("nan"), np.inf
REWARD = np.array([[[0.0, 1.0], [1.0, NAN]], [[0.0, 3.0], [np.log(3), 5.0]], [[2.0, 7.0], [2.0, 7.0]]])
"""Three responses with two candidates each: two prompts, of which the first has two responses."""
PROMPTS = ["p", "p", "q"]


def test_levels_by_hand():
    """v = 1 on the first objective: shares (1, e) / (1 + e), (1, 3) / 4 and (1, 1) / 2; prompt p is the mean of its two."""
    found = realised_levels(REWARD, ("a", "b"), PROMPTS, {"a": 1.0}, np.array([1, 0, 1]), np.zeros((0, 1)), 200, 0)
    a, b = found["levels"]["a"], found["levels"]["b"]
    first, second = np.e / (1 + np.e), 0.75 * np.log(3)
    assert a["expected"]["mean"] == pytest.approx(((first + second) / 2 + 2.0) / 2)
    assert a["realised"]["mean"] == pytest.approx(((1.0 + 0.0) / 2 + 2.0) / 2)
    assert a["base"]["mean"] == pytest.approx(((0.5 + np.log(3) / 2) / 2 + 2.0) / 2)
    assert b["expected"]["mean"] == pytest.approx(((1.0 + (0.25 * 3 + 0.75 * 5)) / 2 + 7.0) / 2)  # the unscored one is left out
    assert b["realised"]["mean"] == pytest.approx((3.0 + 7.0) / 2)  # of prompt p only the second response is scored
    share = np.array([[1 / (1 + np.e), first], [0.25, 0.75], [0.5, 0.5]])
    assert found["kl"] == pytest.approx(float((share * np.log(2 * share)).sum(axis=1).mean()))
    assert a["expected"]["lo"] <= a["expected"]["mean"] <= a["expected"]["hi"]


def test_the_interval_has_the_errors_of_the_bank_and_of_the_prompts():
    reward = np.random.default_rng(0).normal(size=(60, 8, 1))
    prompts = [str(i) for i in range(60)]
    one = realised_levels(reward, ("a",), prompts, {"a": 1.0}, np.zeros(60, dtype=int), np.ones((1, 1)), 400, 0)
    spread = np.linspace(0.2, 1.8, 50)[:, None]
    many = realised_levels(reward, ("a",), prompts, {"a": 1.0}, np.zeros(60, dtype=int), spread, 400, 0)
    narrow, wide = (e["levels"]["a"]["expected"] for e in (one, many))
    assert narrow["mean"] == wide["mean"]
    assert wide["hi"] - wide["lo"] > 1.3 * (narrow["hi"] - narrow["lo"])


@pytest.mark.parametrize(
    ("lo", "hi", "floor", "ceiling", "says"),
    [
        (1.0, 2.0, 0.5, NONE, "met"),
        (1.0, 2.0, 1.5, NONE, "within"),
        (1.0, 2.0, 2.5, NONE, "missed"),
        (1.0, 2.0, -NONE, 0.5, "missed"),
        (1.0, 2.0, -NONE, 2.5, "met"),
        (1.0, 2.0, 0.5, 1.5, "within"),
        (None, None, 0.5, NONE, "unscored"),
    ],
)
def test_verdicts(lo, hi, floor, ceiling, says):
    assert verdict({"mean": 1.5, "lo": lo, "hi": hi}, floor, ceiling) == says


def test_misses_by_hand():
    # a floor missed by 0.5 of sd 2, a ceiling passed by 0.5 of sd 0.5, a floor that holds; the unscored one is left out
    level, floor, ceiling = np.array([1.0, 2.5, 3.0, NAN]), np.array([1.5, -NONE, 1.0, 0.0]), np.array([NONE, 2.0, NONE, NONE])
    found = target_misses(level, floor, ceiling, np.array([2.0, 0.5, 1.0, 1.0]), ["within", "missed", "met", "unscored"])
    assert found["target_error"] == pytest.approx((0.25 + 1.0 + 0.0) / 3)
    assert found["violation_rate"] == pytest.approx(1 / 3)
    assert (found["targets"], found["scored"]) == (4, 3)
    nothing = target_misses(level[3:], floor[3:], ceiling[3:], np.ones(1), ["unscored"])
    assert np.isnan([nothing["target_error"], nothing["violation_rate"]]).all()


def test_the_loop_corrects_in_turn():
    reward = np.random.default_rng(1).normal(size=(600, 8, 1))
    monitor = Monitor(np.array([0.6]), np.array([NONE]), np.zeros(1))
    chosen, used = closed_loop(reward, range(600), monitor)
    first = monitor.corrections[0]["after"]
    assert (used[:first] == 0).all()
    assert (used[first] > 0).all()
    served = reward[np.arange(600), chosen, 0]
    assert served[:first].mean() < 0.3
    assert served[-300:].mean() == pytest.approx(0.6, abs=0.25)


@pytest.fixture(scope="module")
def bank() -> Bank:
    reward = np.random.default_rng(2).normal(size=(240, 3)) @ np.array([[1, -0.4, 0], [0, 0.9, 0.1], [0, 0, 1.0]])
    return Bank.of(("a", "b", "c"), reward, np.arange(240) // 6)


def drawn(text: str) -> str:
    """The words of a figure, after checks that any figure passes."""
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "nan" not in text.lower()
    return " ".join(root.itertext())


def test_figures_of_a_quote(bank):
    found = quote(bank, "a>=+0.3sd b>=keep c<=+0.1", n_boot=0)
    problem = problem_of(bank, "grouped", 6)
    figures = palette_figures(found, bank, problem, explore(problem, 30))
    assert set(figures) == {"distributions.svg", "radar.svg", "multipliers.svg", "multipliers-3d.svg", "reachable.svg"}
    for name, text in figures.items():
        assert "a" in drawn(text).split() or "a, nats per unit" in drawn(text), name
    assert "target" in drawn(figures["distributions.svg"])
    assert "can be had" in drawn(figures["reachable.svg"])
    assert palette_figures(found, bank, problem, explore(problem, 30)) == figures  # the same bytes
    never = quote(bank, "a>=100 b>=keep", n_boot=0)
    assert set(palette_figures(never, bank, problem_of(bank.scored(("a", "b")), "grouped", 6), None)) == set()


def test_figures_leave_out_what_is_unscored():
    rows = [
        {"ask": "a>=1", "dual": d, "floors": {"a": 1.0}, "ceilings": {"b": 2.0}, "levels": {"a": level, "b": {}}}
        for d, level in (("grouped", {"expected": {"mean": 0.5, "lo": 0.4, "hi": 0.6}, "base": {"mean": None}}), ("pooled", {}))
    ]
    words = drawn(asked_figure(rows, ("a", "b")))
    assert "grouped: a>=1" in words
    assert "pooled: a>=1" in words
    reward = np.array([[1.0, NAN], [2.0, 1.0], [3.0, 4.0]])
    assert "a" in drawn(distributions_figure(("a", "b"), reward, np.ones(3), {"a": [1.5, 2.5]}))
    assert radar_figure(("a", "b"), {"base": [0.5, 0.5]}) == ""
    assert region_figure(("a",), np.ones((4, 1)), np.array([True] * 4), None) == ""
    lone = reachable_figure(("a", "b"), np.eye(2), np.eye(2), np.zeros(2), np.array([0.5, NONE]), None)
    assert "the palette" not in drawn(lone)


def test_tables(bank):
    record = as_json(quote(bank, "a>=+0.3sd b>=keep c<=+0.1", n_boot=0), bank) | {"cost": {"candidates": 6, "scores": 18}}
    table = palette_table(record)
    assert "feasible  yes" in table
    assert f">= {record['floors']['a']:.3f}" in table
    assert f"<= {record['ceilings']['c']:.3f}" in table
    assert "6 candidates and 18 scores per response" in table
    never = as_json(quote(bank, "a>=100", n_boot=0), bank)
    assert "nearest that can be had" in palette_table(never)
    assert "more than the bank has per prompt" in palette_table(never)


def test_what_was_served_in_a_table_and_figures(bank):
    level = {"base": {"mean": 0.0}, "expected": {"mean": 0.2, "lo": None, "hi": None}}
    row = {"ask": "a>=1", "dual": "grouped", "targets": {"a": 1.0}, "floors": {"a": 1.0}, "ceilings": {}}
    row |= {"levels": dict.fromkeys("abc", level), "shortfall": {"a": 0.8}, "verdict": {"a": "missed"}}
    result = {"objectives": ["a", "b", "c"], "palettes": [row]}
    assert applied_table(result).splitlines()[1].split() == ["a>=1", "grouped", "a", "0.000", ">=", "1.000", "0.200", "0.800", "missed"]
    row["multipliers"] = {"a": 0.5}
    row["closed_loop"] = {"corrections": [{"after": 40, "before": np.array([0.5]), "multipliers": np.array([1.25])}]}
    assert applied_table(result).splitlines()[-1] == "closed loop, a>=1 (grouped): after 40 responses a 0.500 to 1.250"
    assert set(applied_figures(result, bank)) == {"asked.svg", "radar.svg"}
