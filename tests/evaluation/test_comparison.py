"""A comparison of three objectives from its folder to its page: sampled, scored and kept as the stage keeps them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.evaluation.comparison import comparison_of
from equipoise.evaluation.report import render_report
from equipoise.evaluation.responses import responses_of
from equipoise.evaluation.sweep import Scored, sweep_point
from equipoise.runs import read_json, write_json
from equipoise.types import Prompt, Request, Rollout
from evaluation.small_comparison import rollout
from evaluation.test_report import Page

LETTERS = ("ash", "birch", "cedar")
GRID = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3)]
PROMPTS = [Prompt(id=f"p{i}", messages=({"role": "user", "content": f"trees, please {i}"},)) for i in range(6)]


class Trees:
    """Names trees; with weights `more` of the weighted ones on top."""

    objectives = LETTERS

    def __init__(self, more: int, kl: float, cost: int) -> None:
        """`kl` nats and `cost` plain responses for each of them."""
        self.more, self.kl, self.cost = more, kl, cost

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        return [self._one(r) for r in requests]

    def _one(self, request: Request) -> Rollout:
        rng = random.Random(request.seed)
        said = rng.choices(LETTERS, k=12) + (rng.choices(LETTERS, weights=request.weights, k=self.more) if request.weights else [])
        made = rollout(request.prompt.id, 0, " ".join(said), self.kl, self.cost)
        return replace(made, id=request.id, seed=request.seed, weights=request.weights)


class Count:
    """How often a word is said."""

    def __init__(self, name: str) -> None:
        """Of this word."""
        self.name = name

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        return np.array([float(text.split().count(self.name)) for text in responses])


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[dict[str, Any], list[Scored]]:
    """The evaluation as it reads back from its file, and the points behind it."""
    folder: Path = tmp_path_factory.mktemp("comparison")
    rewards, points = [Count(name) for name in LETTERS], []
    methods = {"reference": (Trees(0, 0.0, 1), [None], 4), "near": (Trees(3, 0.5, 1), GRID, 1), "far": (Trees(9, 4.0, 2), GRID, 1)}
    for name, (sampler, weights, samples) in methods.items():
        points += [sweep_point(folder, name, sampler, w, PROMPTS, samples, 1, rewards, 8) for w in weights]
    settings = {"best_of": [2, 4], "each_best_of": [], "ref_point": -1.0, "n_boot": 60, "examples": 1, "seed": 1, "kl_budget": 2.0}
    asked = {p.id: p for p in PROMPTS}
    found = comparison_of(folder, LETTERS, asked, {"near": GRID, "far": GRID}, GRID, settings)
    write_json(folder / "evaluation.json", found | {"model": "trees"})
    return read_json(folder / "evaluation.json"), points


def test_every_two_objectives_are_compared(compared: Any) -> None:
    found, _ = compared
    assert found["title"] == "ash, birch and cedar: near, far on the same prompts"
    assert [face["objectives"] for face in found["faces"]] == [["ash", "birch"], ["ash", "cedar"], ["birch", "cedar"]]
    for face in found["faces"]:
        size = {row["method"]: row["points"] for row in face["methods"]}
        assert size == {"reference": 1, "near": 3, "far": 3, "best-of-2": 3, "best-of-4": 3}
        volume = {row["method"]: row["hypervolume"]["mean"] for row in face["methods"]}
        assert volume["far"] > volume["near"] > volume["reference"]


def test_all_are_brought_to_the_budget_of_the_settings(compared: Any) -> None:
    found, _ = compared
    rows = {row["method"]: row for row in found["at_kl"]["methods"]}
    assert found["at_kl"]["budget"] == 2.0
    assert (rows["near"]["share"], rows["far"]["share"]) == ([1, 1], [0.5, 0.5])
    full = {row["method"]: row["value"] for row in found["hypervolume"]}
    assert rows["near"]["hypervolume"]["mean"] == pytest.approx(full["near"])
    assert rows["far"]["hypervolume"]["mean"] < full["far"]
    gain = next(p["gain"][0]["mean"] for p in found["points"] if p["method"] == "far" and p["weights"] == [1, 0, 0])
    assert rows["far"]["gains"][0]["mean"] == pytest.approx(gain / 2)


def test_classes_of_cost_and_quantiles(compared: Any) -> None:
    found, points = compared
    classes = {(p["method"], p["n_candidates"]): p["cost_class"] for p in found["points"]}
    assert classes == {("reference", 1): 1, ("near", 1): 1, ("far", 1): 2, ("best-of-n", 2): 2, ("best-of-n", 4): 4}
    said = np.array([r.text.split().count("ash") for r in points[0].rollouts], dtype=float)
    rows = {row["method"]: row for row in found["distributions"][0]["methods"]}
    assert rows["reference"]["quantiles"][2] == pytest.approx((np.median(said) - said.mean()) / said.std(ddof=1))
    assert set(rows) == {"reference", "near", "far", "best-of-2", "best-of-4"}


def test_the_page_opens_every_point_of_the_folder(compared: Any) -> None:
    found, points = compared
    page = Page(render_report(found, responses_of(points, {p.id: p for p in PROMPTS})))
    ids = page.ids()
    assert all(section in ids for section in ("front", "classes", "at_kl", "faces", "distributions"))
    assert "profile" not in ids  # three objectives need no radar
    assert len(ids) == len(set(ids))
    buttons = [a["data-point"] for tag, a in page.tags if tag == "button" and a.get("class") == "point"]
    assert buttons == [str(i) for i in range(len(found["points"]))]
    best = next(p for p in found["points"] if p["n_candidates"] == 4 and p["weights"] == [1, 0, 0])
    # of each prompt's four the one that names most ashes
    said = [points[0].rollouts[row] for row in best["chosen"]]
    assert [r.prompt_id for r in said] == [p.id for p in PROMPTS]
    for response in said:
        others = [r.text.split().count("ash") for r in points[0].rollouts if r.prompt_id == response.prompt_id]
        assert response.text.split().count("ash") == max(others)
