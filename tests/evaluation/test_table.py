"""The Markdown tables of a comparison, on numbers written by hand."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.table import faces_table, markdown_tables, methods_table, prices_table


def estimate(mean: float | None, half: float = 0.1) -> dict[str, Any]:
    return {"mean": mean, "lo": None if mean is None else mean - half, "hi": None if mean is None else mean + half}


def evaluation() -> dict[str, Any]:
    def row(name: str, points: int, cost: float, kl: float | None, seconds: float | None) -> dict[str, Any]:
        return {"method": name, "points": points, "cost": cost, "kl": estimate(kl), "training_seconds": seconds}

    def volume(name: str, value: float) -> dict[str, Any]:
        return {"method": name, "value": value, "lo": value - 0.5, "hi": value + 0.5}

    ends = [("a|b", "helpful", 0.62), ("a|b", "harmless", -0.204), ("best-of-2", "helpful", 0.4)]
    return {
        "objectives": ["helpful", "harmless"],
        "methods": [row("reference", 1, 1.0, 0.0, None), row("a|b", 3, 1.25, 2.5, 1530.0), row("best-of-2", 3, 2.0, None, None)],
        "hypervolume": [volume("best-of-2", 1.5), volume("reference", 1.0), volume("a|b", 2.0)],
        "at_kl": {"budget": 1.0, "methods": [{"method": "a|b", "hypervolume": estimate(1.75)}]},
        "equal_length": [
            *({"method": m, "objective": k, "gains": [{"gain": estimate(g)}, {"gain": estimate(9.0)}]} for m, k, g in ends),
            {"method": "best-of-2", "objective": "harmless", "gains": []},
        ],
    }


def test_every_method_is_a_row_with_the_gains_of_its_own_ends():
    assert methods_table(evaluation()).splitlines() == [
        "| method | points | training, min | cost | KL, nats | helpful | harmless | hypervolume | hypervolume within 1.0 nats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| reference | 1 | – | 1.0 | 0.00 | – | – | 1.00 [0.50, 1.50] | – |",
        "| a\\|b | 3 | 26 | 1.2 | 2.50 | +0.62 [+0.52, +0.72] | −0.20 [−0.30, −0.10] | 2.00 [1.50, 2.50] | 1.75 [1.65, 1.85] |",
        "| best-of-2 | 3 | – | 2.0 | – | +0.40 [+0.30, +0.50] | – | 1.50 [1.00, 2.00] | – |",
    ]


def test_two_objectives_at_a_time_say_where_points_are_fewer():
    def face(k: str, *rows: tuple[str, int, float]) -> dict[str, Any]:
        return {"objectives": ["brief", k], "methods": [{"method": m, "points": n, "hypervolume": estimate(v)} for m, n, v in rows]}

    made = evaluation() | {"faces": [face("helpful", ("best-of-2", 3, 2.0), ("a|b", 2, 1.5)), face("harmless", ("best-of-2", 3, 1.25))]}
    assert faces_table(made).splitlines()[2:] == [
        "| reference | – | – |",
        "| a\\|b | 1.50 [1.40, 1.60] of 2 | – |",
        "| best-of-2 | 2.00 [1.90, 2.10] | 1.25 [1.15, 1.35] |",
    ]
    text = markdown_tables(made | {"equal_kl": [], "equal_compute": []})
    assert text.count("| method |") == 2


def test_differences_at_one_price_mark_the_mixtures():
    def row(k: str, gain: float, share: float) -> dict[str, Any]:
        return {"ours": "a|b", "other": "best-of-n", "objective": k, "difference": estimate(gain), "share": share}

    made = evaluation() | {"faces": [], "equal_kl": [row("helpful", 0.5, 0.4), row("harmless", -0.5, 1.0)], "equal_compute": []}
    head, _, line = prices_table(made).splitlines()
    assert head == "| method | helpful, equal KL | harmless, equal KL | helpful, equal compute | harmless, equal compute |"
    assert line == "| a\\|b | +0.50 [+0.40, +0.60]* | −0.50 [−0.60, −0.40] | – | – |"
    assert markdown_tables(made).count("| method |") == 2
