"""The Markdown table of a comparison, on numbers written by hand."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.table import markdown_table


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
    assert markdown_table(evaluation()).splitlines() == [
        "| method | points | training, min | cost | KL, nats | helpful | harmless | hypervolume | hypervolume within 1.0 nats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| reference | 1 | – | 1.0 | 0.00 | – | – | 1.00 [0.50, 1.50] | – |",
        "| a\\|b | 3 | 26 | 1.2 | 2.50 | +0.62 [+0.52, +0.72] | −0.20 [−0.30, −0.10] | 2.00 [1.50, 2.50] | 1.75 [1.65, 1.85] |",
        "| best-of-2 | 3 | – | 2.0 | – | +0.40 [+0.30, +0.50] | – | 1.50 [1.00, 2.00] | – |",
    ]
