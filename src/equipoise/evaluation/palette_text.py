"""Palettes as readable tables: a quote, and what serving delivered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def palette_table(record: Mapping[str, Any]) -> str:
    """A quote as a readable table."""
    which = record["dual"] + (f" dual, n = {record['n']}" if record["n"] else " dual")
    lines = [f"ask       {record['ask']}", f"bank      {record['rows']} rows, {record['groups']} groups ({which})"]
    margin = "no target to miss" if record["margin_sd"] == float("inf") else f"margin {_number(record['margin_sd'])} sd"
    lines.append(f"feasible  {'yes' if record['feasible'] else 'no'}, {margin}")
    names = list(record["targets"])
    if not record["feasible"]:
        rows = [[name, _number(record["base"][name]), _bounds(record, name), _asked(record["nearest"][name])] for name in names]
        lines += ["", *_table(["objective", "base", "asked", "nearest that can be had"], rows)]
        lines.append("note: at those very levels the multipliers are infinite; ask 0.1 sd less")
        return "\n".join(lines + _notes(record))
    rows = []
    for name in names:
        low_high = (record["level_intervals"] or {}).get(name)
        multiplier = (record["multiplier_intervals"] or {}).get(name)
        rows.append(
            [name, _number(record["base"][name]), _bounds(record, name), _number(record["levels"][name], low_high),
             _number(record["multipliers"][name], multiplier), f"{record['price'][name] * record['sd'][name]:.3f}"]
        )  # fmt: skip
    lines += ["", *_table(["objective", "base", "asked", "level [new prompts]", "multiplier, nats/unit", "nats/sd"], rows)]
    others = [name for name in record["levels"] if name not in names]
    if others:
        lines.append("not asked: " + ", ".join(f"{name} {_number(record['levels'][name])}" for name in others))
    lines += [
        "",
        f"KL        {record['kl']:.3f} nats; effective rows {record['ess']:.0f}; largest share of a group {record['max_weight']:.3f}",
    ]
    if record["dual"] == "grouped":
        cost = record["cost"]
        tokens = cost.get("backbone_tokens")
        spent = f", {tokens:.0f} backbone tokens ({cost['backbone_tokens_of_one']:.0f} for a plain one)" if tokens else ""
        lines.append(f"cost      {cost['candidates']} candidates and {cost['scores']} scores per response{spent}")
    return "\n".join(lines + _notes(record))


def _notes(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if record["dual"] == "grouped":
        fewest = record["smallest_n"]
        lines.append(f"n needed  {fewest if fewest else 'more than the bank has per prompt'}")
    if "sequential" in record:
        steps = ", ".join(f"{v:.2g}" for v in record["sequential"]["shortfall"])
        lines.append(f"one at a time, largest shortfall per round: {steps}")
    if "explored" in record:
        share = record["explored"]
        found = f"{100 * share['improve_all']:.0f} % improve every objective, {100 * share['meet']:.0f} % meet the ask"
        lines.append(f"of {share['draws']} random multipliers {found}")
    lines += [f"note: {w}" for w in record["warnings"]]
    return [*lines, f"files     {' '.join(record['files'])}"] if "files" in record else lines


def _number(value: float | None, interval: list[float] | None = None) -> str:
    ends = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    # A rounded -0.000 would look like a sign that means something.
    return "–" if value is None or value != value else f"{round(value, 3) + 0.0:.3f}{ends}"


def _bounds(record: Mapping[str, Any], name: str) -> str:
    parts = [f"{sign} {record[key][name]:.3f}" for key, sign in (("floors", ">="), ("ceilings", "<=")) if name in record[key]]
    return " ".join(parts)


def _asked(bound: float | list[float]) -> str:
    return " to ".join(f"{b:.3f}" for b in bound) if isinstance(bound, list) else f"{bound:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def applied_table(result: Mapping[str, Any]) -> str:
    """What was served as a readable table."""
    rows = []
    for row in result["palettes"]:
        for name in row["targets"]:
            level = row["levels"][name]
            ends = [level["expected"]["lo"], level["expected"]["hi"]]
            rows.append(
                [row["ask"] if name == next(iter(row["targets"])) else "", row["dual"], name, _number(level["base"]["mean"]),
                 _bounds(row, name), _number(level["expected"]["mean"], ends if None not in ends else None),
                 _number(row["shortfall"][name]), row["verdict"][name]]
            )  # fmt: skip
    head = ["ask", "dual", "objective", "base", "asked", "level, 95 %", "shortfall", "asked level is"]
    lines = [*_table(head, rows), *(line for row in result["palettes"] for line in _loop(row))]
    for dual, found in result.get("duals", {}).items():
        certain = (
            f"{100 * found['violation_rate']:.0f} % of {found['scored']} missed with the whole interval"
            if found["scored"]
            else "none scored"
        )
        lines.append(f"{dual}: targets missed by {_number(found['target_error'])} sd on average, {certain}")
    return "\n".join(lines)


def _loop(row: Mapping[str, Any]) -> list[str]:
    """The corrections of a palette that was also served in a closed loop."""
    lines = []
    for change in row.get("closed_loop", {}).get("corrections", []):
        pairs = zip(row["multipliers"], change["before"], change["multipliers"], strict=True)
        moved = ", ".join(f"{name} {before:.3f} to {after:.3f}" for name, before, after in pairs)
        lines.append(f"closed loop, {row['ask']} ({row['dual']}): after {change['after']} responses {moved}")
    return lines
