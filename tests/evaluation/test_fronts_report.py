"""The fronts of a page: which methods an overview shows, panels by cost, one KL, every two objectives, and the figures beside them."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from equipoise.evaluation.figures import front_figure
from equipoise.evaluation.fronts_report import MOST, classes_section, front_section
from equipoise.evaluation.headline import headline
from equipoise.evaluation.markup import MISSING
from equipoise.evaluation.profile_figures import distribution_figure, radar_figure
from equipoise.evaluation.report import render_report
from evaluation.test_method_report import cells, estimate
from evaluation.test_report import HOSTILE

OBJECTIVES = ["helpful", "harmless", "brief"]
ENDS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def point(method: str, weights: Any, reward: list[float | None], n: int = 1, cost_class: int = 1) -> dict[str, Any]:
    found = [estimate(r) for r in reward]
    made = {"method": method, "label": method, "weights": weights, "n_candidates": n, "cost_class": cost_class}
    return made | {"reward": found, "gain": found, "judge": [], "kl": 1.0, "cost": float(cost_class), "words": 10.0, "source": "s"}


def evaluation(methods: int = 3, prefix: str = "m") -> dict[str, Any]:
    """Method i is at i along its weights, so that each one is below the next, except that m0 alone gives 99 of brief."""
    points = [point("reference", None, [0.0, 0.0, 0.0])]
    for i in range(methods):
        for end, weights in enumerate(ENDS):
            points.append(
                point(f"{prefix}{i}", weights, [99.0 if i == 0 and k == end == 2 else i * (k == end) for k in range(3)], 1, 1 + i % 2)
            )
    points += [point("best-of-n", weights, [0.5, 0.5, 0.5], 2, 2) for weights in ENDS]
    return {"title": "t", "model": "m", "objectives": OBJECTIVES, "judges": [], "points": points}


def drawn(section: str) -> list[set[str]]:
    """The names in each figure's legend, and its other short labels."""
    return [set(re.findall(r">(m\d+|reference|best-of-n)<", svg)) for svg in re.findall(r"<svg.*?</svg>", section, re.DOTALL)]


def test_an_overview_of_few_methods_shows_all() -> None:
    section = front_section(evaluation(MOST))
    assert drawn(section) == [{*(f"m{i}" for i in range(MOST)), "reference", "best-of-n"}] * 3
    assert "Left out" not in section


def test_an_overview_of_many_shows_what_no_other_dominates() -> None:
    """m8 is above all others on helpful and harmless; with brief m0 has its 99."""
    section = front_section(evaluation(9))
    ladder = {"reference", "best-of-n"}
    assert drawn(section) == [{"m8"} | ladder, {"m0", "m8"} | ladder, {"m0", "m8"} | ladder]
    assert re.findall(r"Left out: (\d) methods", section) == ["8", "7", "7"]


def test_panels_by_cost_hold_all_methods_beside_best_of_their_n() -> None:
    made = evaluation(2 * MOST + 3)
    made["hypervolume"] = [{"method": f"m{i}", "value": float(i)} for i in range(2 * MOST + 3)]
    section = classes_section(made)
    panels = drawn(section)
    even, odd = ([f"m{i}" for i in reversed(range(2 * MOST + 3)) if i % 2 == rest] for rest in (0, 1))
    expected = [
        {"reference", *even[:5]},
        {"reference", *even[5:]},
        {"reference", "best-of-n", *odd[:4]},
        {"reference", "best-of-n", *odd[4:]},
    ]
    assert panels == [names for names in expected for _ in range(3)]
    assert re.findall(r"<h3>(.*?)</h3>", section) == [
        "At about the cost of one plain response",
        "At about the cost of best-of-2",
    ]


def test_a_method_looks_the_same_in_every_figure() -> None:
    made = evaluation(5)
    alone = front_figure(made, "helpful", "harmless", [p for p in made["points"] if p["method"] == "m3"])
    colour = "#009e73"  # the fourth of the spare ones
    assert colour in alone
    assert len(re.findall(r"<svg", alone)) == 1
    assert colour not in front_figure(made, "helpful", "harmless", [p for p in made["points"] if p["method"] == "m2"])


def test_tables_of_faces_and_of_one_kl() -> None:
    row = {
        "method": "m0",
        "cost": 1.5,
        "points": 3,
        "hypervolume": estimate(4.75),
        "mean_inner_product": estimate(1.25),
        "kl": estimate(2.5),
    }
    faces = [{"objectives": ["helpful", "harmless"], "methods": [row]}]
    nothing: dict[str, Any] = {"cost": 1.5, "hypervolume": estimate(None), "faces": [None] * 3, "gains": [None] * 3}
    gains = [estimate(0.5), None, estimate(-1)]
    rows = [
        {"method": "m0", "cost": 1.5, "points": 7, "spent": 4.0, "share": [0.25, 0.5], "hypervolume": estimate(4.5)}
        | {"faces": [estimate(2.5), None, None], "gains": gains},
        nothing | {"method": "m1", "spent": 0.5, "share": [1.0, 1.0]},
        nothing | {"method": "m2", "spent": 2.0, "share": [0.5, 0.5]},
    ]
    page = render_report(evaluation() | {"faces": faces, "at_kl": {"budget": 1.0, "methods": rows, "points": evaluation()["points"]}})
    assert cells(page, "helpful and harmless")[1] == ["m0", "1.50×", "3", "4.75 [4.65, 4.85]", "1.25 [1.15, 1.35]", "2.50 [2.40, 2.60]"]
    _, head, *found = cells(page, "At the same KL")
    assert head[2:6] == ["points", "KL before", "share answered", "all"]
    assert head[5:] == ["all", "helpful, harmless", "helpful, brief", "harmless, brief", *OBJECTIVES]
    volumes, gained = (
        ["4.50 [4.40, 4.60]", "2.50 [2.40, 2.60]", MISSING, MISSING],
        ["+0.50 [+0.40, +0.60]", MISSING, "−1.00 [−1.10, −0.90]"],
    )
    assert found[0][2:] == ["7", "4.00", "25\u00a0% to 50\u00a0%", *volumes, *gained]
    assert [cell[4] for cell in found[1:]] == ["unchanged", "50\u00a0%"]
    assert found[1][5:] == [MISSING] * 7
    assert "Every point within 1.0 nats" in page


def test_headline_of_many_methods_names_the_best_of_each_cost() -> None:
    made = evaluation(6)
    values = {f"m{i}": float(i) for i in range(6)} | {"reference": 1.0, "best-of-2": 4.5}
    classes = {"reference": 1, "best-of-2": 2} | {f"m{i}": 1 + i % 2 for i in range(6)}
    made["hypervolume"] = [
        {"method": m, "value": v, "lo": v - 0.5, "hi": v + 0.5, "points": 3, "cost_class": classes[m]} for m, v in values.items()
    ]
    rows = [
        {"ours": f"m{i}", "other": "best-of-2", "objective": o, "difference": estimate(i / 4 - 0.5)} for i in range(6) for o in OBJECTIVES
    ]
    made["equal_compute"] = rows
    best, compute = (sentence.replace("\u00a0", " ") for sentence in headline(made))
    assert best == (
        "Largest hypervolume of 6 methods: m4, at about the cost of one plain response (4.00, 95 % interval 3.50 to 4.50; reference 1.00); "
        "and m5, at about the cost of best-of-2 (5.00, 95 % interval 4.50 to 5.50; best-of-2 4.50)."
    )
    # a front of fewer points is smaller for that alone, and one dearer than any best-of-n has nothing beside it
    made["hypervolume"][5] |= {"points": 2}
    made["hypervolume"][3] |= {"cost_class": 0}
    assert headline(made)[0].replace("\u00a0", " ") == (
        "Largest hypervolume of 5 methods with all 3 points: m4, at about the cost of one plain response (4.00, 95 % interval 3.50 to "
        "4.50; reference 1.00); m1, at about the cost of best-of-2 (1.00, 95 % interval 0.50 to 1.50; best-of-2 4.50); and m3, dearer "
        "than the largest best-of-n (3.00, 95 % interval 2.50 to 3.50)."
    )
    # the intervals are 0.2 wide: m0 and m1 are behind by 0.5 and 0.25, m2 is at 0, m3 to m5 are ahead
    assert compute == (
        "At equal compute with best-of-n, 6 methods are ahead in 9 of 18 comparisons, behind in 6 and undecided in 3. "
        "Ahead wherever compared: m3, m4, and m5."
    )


def profile(names: int) -> dict[str, Any]:
    made = [f"o{k}{HOSTILE}" for k in range(names)]
    even, end = [1 / names] * names, [1.0] + [0.0] * (names - 1)
    points = [
        point("soup", even, [0.5, -0.25, 1.0, 0.0, 2.0][:names]),
        point("MOD", end, [1.0] * names),
        point("DPO", even, [None] * names),
    ]
    return {"title": "t", "model": "m", "objectives": made, "points": points}


@pytest.mark.parametrize("names", [4, 5])
def test_a_radar_has_a_panel_per_method_at_equal_weights(names: int) -> None:
    svg = radar_figure(profile(names))
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert ">soup<" in svg
    assert ">MOD<" not in svg  # it has no point at equal weights
    assert ">DPO<" not in svg  # unscored
    assert sum(f">o{k}" in svg for k in range(names)) == names
    assert svg == radar_figure(profile(names))


@pytest.mark.parametrize("names", [1, 2, 3])
def test_three_objectives_need_no_radar(names: int) -> None:
    assert radar_figure(profile(names)) == ""


def test_a_distribution_has_a_row_per_method() -> None:
    levels = [{"method": m, "quantiles": q} for m, q in (("reference", [-2, -1, 0, 1, 2]), ("soup", [0, 1, 2, 3, 4]), ("lost", None))]
    made = {"distributions": [{"objective": f"helpful{HOSTILE}", "methods": levels}]}
    svg = distribution_figure(made, 0)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert ">soup<" in svg
    assert ">lost<" not in svg
    assert distribution_figure(made, 1) == distribution_figure({}, 0) == ""
    # the axis begins left of the reference's 5 % quantile and ends right of the other's 95 % one
    assert ">−2<" in svg
    assert ">4<" in svg
