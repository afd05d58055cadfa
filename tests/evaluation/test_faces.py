"""Two objectives of three: which points stand on a face, and every number of a row worked by hand."""

from __future__ import annotations

import pytest

from equipoise.evaluation.faces import face_rows, pairs_of
from equipoise.evaluation.methods import distribution_rows
from equipoise.objectives import on_face
from evaluation.small_comparison import OBJECTIVES, placed, scored, summary_of

NAN = float("nan")


def test_pairs_only_of_three_or_more() -> None:
    assert pairs_of(1) == pairs_of(2) == []
    assert pairs_of(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(pairs_of(5)) == 10


def test_a_face_holds_what_weighs_nothing_else() -> None:
    assert on_face((0.3, 0.7, 0.0), (0, 1))
    assert on_face((0.0, 1.0, 0.0), (0, 1))
    assert not on_face((0.3, 0.6, 0.1), (0, 1))
    assert on_face(None, (0, 1))
    assert on_face((1 / 3, 0.0, 2 / 3), (0, 2))


def test_rows_by_hand() -> None:
    summary = summary_of(scored("reference", None, [(0, 0, 0)]))
    soup = placed(
        summary,
        "soup",
        [((1, 0, 0), (2, 0, 5), 3.0), ((0, 1, 0), (0, 1, 5), 1.0), ((0, 0, 1), (0, 0, 0), 0.5), ((0.5, 0.5, 0), (1.5, 0.5, -3), 2.0)],
        cost=3,
    )
    few = placed(summary, "few", [((1, 0, 0), (9, 9, 9), 1.0), ((1 / 3, 1 / 3, 1 / 3), (9, 9, 9), 1.0)])
    found = face_rows(summary, {"soup": soup, "few": few, "reference": [summary.reference]}, [-1, -1, -2])
    assert [face["objectives"] for face in found] == [["helpful", "harmless"], ["helpful", "brief"], ["harmless", "brief"]]
    # one point of "few" stands on each face that it stands on at all
    assert [[row["method"] for row in face["methods"]] for face in found] == [["reference", "soup"]] * 3
    rows = [face["methods"][1] for face in found]
    assert [row["points"] for row in rows] == [3, 2, 2]
    # above (-1, -1): (3, 1), (2.5, 1.5), (1, 2); above (-1, -2): (3, 7) holds (1, 2); (2, 7) holds (1, 2)
    assert [row["hypervolume"]["mean"] for row in rows] == pytest.approx([3 * 1 + 2.5 * 0.5 + 1 * 0.5, 3 * 7, 2 * 7])
    # the ends get what they ask for, 2 and 1; the middle half of 1.5 and half of 0.5
    assert [row["mean_inner_product"]["mean"] for row in rows] == pytest.approx([(2 + 1 + 1) / 3, (2 + 0) / 2, (1 + 0) / 2])
    assert [row["kl"]["mean"] for row in rows] == pytest.approx([(3 + 1 + 2) / 3, (3 + 0.5) / 2, (1 + 0.5) / 2])
    assert [row["cost"] for row in rows] == [3, 3, 3]
    # equal prompts leave nothing to resample
    assert rows[0]["hypervolume"]["lo"] == pytest.approx(rows[0]["hypervolume"]["hi"])
    alone = [face["methods"][0] for face in found]
    assert [row["hypervolume"]["mean"] for row in alone] == pytest.approx([1 * 1, 1 * 2, 1 * 2])
    assert [row["mean_inner_product"]["mean"] for row in alone] == pytest.approx([NAN] * 3, nan_ok=True)
    assert [row["points"] for row in alone] == [1, 1, 1]


def test_intervals_are_those_of_the_prompts() -> None:
    """Prompt p has reward 3 and q 1 on the first objective: of two drawn prompts the mean is 3, 2 or 1."""
    summary = summary_of(scored("reference", None, [(0, 0, 0)]))
    points = [summary.point(scored("m", w, [(3, 0, 0), (1, 0, 0)])) for w in ((1, 0, 0), (0, 1, 0))]
    row = face_rows(summary, {"m": points}, [0, -1, 0])[0]["methods"][0]
    assert row["hypervolume"] == pytest.approx({"mean": 2, "lo": 1, "hi": 3})


def test_quantiles_of_single_responses() -> None:
    summary = summary_of(scored("reference", None, [(k, 0, 0) for k in range(4)] + [(NAN, 0, 0)] * 4))
    rows = [(float(k), 7, 7) for k in range(21)] + [(NAN, 7, 7)] + [(float(k), 7, 7) for k in range(21)] + [(NAN, 7, 7)]
    named = {"m": [summary.point(scored("m", (1, 0, 0), rows)), summary.point(scored("m", (0.5, 0.5, 0), rows))]}
    found = distribution_rows(summary, named)
    assert [face["objective"] for face in found] == list(OBJECTIVES)
    reference, mine = found[0]["methods"]
    # 0 to 20 twice: order statistics 2.05, 10.25, 20.5, 30.75 and 38.95 of 0, 0, 1, 1 .. 20, 20
    assert mine["quantiles"] == pytest.approx([1, 5, 10, 15, 19], abs=0.03)
    assert (mine["method"], mine["responses"]) == ("m", 42)
    assert reference["quantiles"] == pytest.approx([0.15, 0.75, 1.5, 2.25, 2.85])
    assert reference["responses"] == 4
    # nobody put all weight on the second objective
    assert [row["method"] for row in found[1]["methods"]] == ["reference"]
