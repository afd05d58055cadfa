"""The report's section about a judge's win rates."""

from __future__ import annotations

from equipoise.evaluation.drawing import Evaluation, weights_text
from equipoise.evaluation.markup import Html, decimal, interval, join, note, percent, table


def win_rates_section(evaluation: Evaluation) -> Html:
    """How often each method's ends win against the reference, and how far the judge can be trusted; nothing without a judge."""
    found = evaluation.get("win_rates") or {}
    rows = [
        [r["method"], r["objective"], weights_text(r.get("weights")), interval(r, key="win_rate"),
         interval({"mean": r.get("like_length_win_rate"), "lo": r.get("like_length_lo"), "hi": r.get("like_length_hi")}),
         f"{decimal(r.get('n_judged'), 0)} of {decimal(r.get('n_pairs'), 0)}", percent(_unread(r), 1), percent(_flipped(r), 1),
         percent(r.get("first_position"), 1)]
        for r in found.get("rows") or []
    ]  # fmt: skip
    head = ["method", "judged on", "weights", "win rate [95 %]", "at like length", "pairs", "unread", "flipped", "first wins"]
    shown = table(head, rows, name="Win rates before a judge")
    if not shown:
        return shown
    return join(
        note(
            f"How often {found['engine']} prefers the method's response to the reference's, each pair in both orders, a tie being half a "
            "win; 0.50 is no difference. Judged are a method's ends on their own objective, and its point nearest to equal weights on the "
            "whole. A pair with an unread verdict is left out. Flipped are pairs on which the two orders disagree; of a fair judge, what "
            "was shown first wins half of its clear verdicts. Like length: pairs of which the shorter has at least 80\u00a0% of the words."
        ),
        shown,
    )


def _unread(row: Evaluation) -> float | None:
    return (row["n_failed"] + row["n_unparsed"]) / (2 * row["n_pairs"]) if row.get("n_pairs") else None


def _flipped(row: Evaluation) -> float | None:
    return None if row.get("agreement") is None else 1 - row["agreement"]
