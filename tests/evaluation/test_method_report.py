"""The report's tables of whole methods: what they show, what they leave out, and an en dash for what is unscored."""

from __future__ import annotations

import re
from typing import Any

import pytest

from equipoise.evaluation.markup import MISSING
from equipoise.evaluation.report import render_report

OBJECTIVES = ["helpful", "harmless"]


def estimate(mean: float | None) -> dict[str, float | None]:
    return {"mean": mean, "lo": None if mean is None else mean - 0.1, "hi": None if mean is None else mean + 0.1}


def method(name: str, **changes: Any) -> dict[str, Any]:
    keys = ("mean_inner_product", "regret", "epsilon", "sparsity", "spacing", "kl")
    row = {"method": name, "cost": 1.5, "points": 5, **{key: estimate(0.5 + i) for i, key in enumerate(keys)}}
    row |= {key: [estimate(value), estimate(-value)] for key, value in (("spread", 7.25), ("follows", 0.75), ("violations", 0.125))}
    row |= {"kl_floor": 0.31, "base_forwards": 321.0, "guide_forwards": 123.0, "reward_calls": 4.0, "seconds": 0.125, "peak_memory": 2.5}
    row |= {"training_seconds": 2220.0}
    return row | {"responses": 400, "unscored": 1, "repetitive": 17, "truncated": 23, "leaks": 29} | changes


def evaluation(**changes: Any) -> dict[str, Any]:
    ends = [{"name": name, "gain": estimate(0.62), "equal_length": estimate(0.41), "slope": estimate(0.3)} for name in ("helpful", "judge")]
    tested = [{"name": name, "difference": estimate(0.25), "p": 0.01, "p_holm": 0.02} for name in ("hypervolume", "regret")]
    moved = [estimate(3.81) | {"ref_point_K": [-1.5, -1.5]}, estimate(0.505) | {"ref_point_K": [-0.5, -0.5]}]
    point = {"method": "soup", "label": "soup", "weights": [1.0, 0.0], "words": 20.0, "reward": [estimate(0.1), estimate(0.2)]}
    made = {
        "title": "t", "model": "m", "objectives": OBJECTIVES, "judges": ["judge"], "ref_point_K": [-1.0, -1.0], "points": [point],
        "hypervolume": [{"method": "soup", "cost": 1.5, "value": 1.905, "lo": 1.6, "hi": 2.2, "points": 5, "at": moved}],
        "methods": [method("soup"), method("reference", regret=estimate(None), follows=[estimate(None)] * 2)],
        "between": [{"ours": "soup", "other": "MOD", "points": 5, "cost": 1.5, "other_cost": 2.0, "metrics": tested}],
        "equal_length": [{"method": "soup", "objective": "helpful", "words": 20.4, "gains": ends}],
    }  # fmt: skip
    return made | changes


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of the table of this name, tags taken away."""
    body = page[page.index(f'aria-label="{name}"') :]
    rows = re.findall(r"<tr>(.*?)</tr>", body[: body.index("</table>")])
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def test_hypervolume_states_its_reference_point_and_two_others() -> None:
    head, row = cells(render_report(evaluation()), "Hypervolume of each method")
    assert head[2:] == ["points", "above (−1.0, −1.0) [95 %]", "above (−1.5, −1.5)", "above (−0.5, −0.5)"]
    assert row == ["soup", "1.50×", "5", "1.905 [1.600, 2.200]", "3.810", "0.505"]
    old = evaluation()
    del old["hypervolume"][0]["at"]
    assert cells(render_report(old), "Hypervolume of each method")[1] == ["soup", "1.50×", "5", "1.905 [1.600, 2.200]"]


def test_metrics_control_and_price() -> None:
    page = render_report(evaluation())
    front = cells(page, "Metrics of the fronts")
    assert front[0] == [
        "method",
        "mean inner product",
        "epsilon",
        "spread of helpful",
        "spread of harmless",
        "sparsity",
        "spacing",
        "points",
    ]
    assert [cell.split(" ")[0] for cell in front[1]] == ["soup", "0.50", "2.50", "7.25", "−7.25", "3.50", "4.50", "5"]
    control = cells(page, "How well the weights control each method")
    assert [cell.split(" ")[0] for cell in control[1]] == ["soup", "1.50", "0.75", "−0.75", "0.12", "−0.12"]
    assert len(control) == 2  # nothing controls the reference
    assert cells(page, "Price of a response")[1] == [
        "soup",
        "5.50 [5.40, 5.60]",
        "0.31",
        "321",
        "123",
        "4.0",
        "1.50×",
        "0.125",
        "2.50",
        "37",
    ]


def test_pairs_slips_and_equal_length() -> None:
    page = render_report(evaluation())
    assert cells(page, "Methods side by side") == [
        ["difference between", "cost", "points", "hypervolume", "regret"],
        ["soup − MOD", "1.50× / 2.00×", "5", *["+0.25 [+0.15, +0.35]p 0.020"] * 2],
    ]
    assert cells(page, "Responses that went wrong")[1] == ["soup", "17", "23", "29", "1", "400"]
    over, head, row = cells(page, "Gains at equal length")
    assert over[3:] == ["its objective", "judge"]
    assert head == ["method", "all weight on", "words", *["gain", "at equal length"] * 2]
    assert row == ["soup", "helpful", "20", *["+0.62 [+0.52, +0.72]", "+0.41 [+0.31, +0.51]"] * 2]


def test_unscored_is_an_en_dash() -> None:
    empty = {key: None for key in method("soup") if key not in ("method",)}
    lost = {"name": "hypervolume", "difference": estimate(None), "p": None, "p_holm": None}
    changed = evaluation(methods=[method("soup") | empty], between=evaluation()["between"])
    changed["between"][0]["metrics"] = [lost]
    changed["equal_length"][0]["gains"] = []
    page = render_report(changed)
    for name in ("Metrics of the fronts", "Price of a response", "Responses that went wrong"):
        assert set(cells(page, name)[1][1:]) == {MISSING}
    assert cells(page, "Methods side by side")[1][3:] == [f"{MISSING}p {MISSING}"]
    assert cells(page, "Gains at equal length")[-1][3:] == [MISSING] * 4


@pytest.mark.parametrize(
    ("key", "gone"), [("methods", 'id="methods"'), ("between", 'id="between"'), ("equal_length", "Gains at equal length")]
)
def test_what_an_older_evaluation_lacks_is_left_out(key: str, gone: str) -> None:
    assert gone in render_report(evaluation())
    page = render_report({k: v for k, v in evaluation().items() if k != key})
    assert gone not in page[: page.index('<script id="evaluation"')]
