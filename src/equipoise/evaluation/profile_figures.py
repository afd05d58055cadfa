"""Figures of what single responses are worth, and of a method on many objectives at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.drawing import Evaluation, canvas, entry, number, short, svg

_COLUMNS = 2


def distribution_figure(evaluation: Evaluation, k: int) -> str:
    """The rewards of responses on objective k, a row per method with all weight on it, the reference above.

    A bar from the first quartile to the third with a line at the median, and a thin line from the 5 % quantile to the 95 % one.
    """
    found: Mapping[str, Any] = entry(evaluation.get("distributions"), k)
    rows = [r for r in found.get("methods") or [] if r.get("quantiles")]
    if not rows:
        return ""
    with canvas(4.0, 0.7 + 0.19 * len(rows)) as figure:
        ax = figure.add_subplot()
        for y, row in enumerate(rows):
            low, first, middle, third, high = row["quantiles"]
            colour = "0.55" if row["method"] == "reference" else "#56B4E9"
            ax.plot([low, high], [y, y], color="0.3", linewidth=0.9, zorder=1)
            ax.barh(y, third - first, left=first, height=0.6, color=colour, edgecolor="0.2", linewidth=0.6, zorder=2)
            ax.plot([middle, middle], [y - 0.3, y + 0.3], color="black", linewidth=1.6, solid_capstyle="butt", zorder=3)
            if row["method"] == "reference":
                ax.axvline(middle, color="0.6", linewidth=0.7, linestyle="--", zorder=0)
        ax.set_yticks(range(len(rows)), [short(row["method"], 28) for row in rows], fontsize=7.5)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xlabel(f"{short(found['objective'], 24)} of a response (sd of the reference)")
        return svg(figure, f"distribution-{k}", f"quantiles of {found['objective']}, a row per method")


def radar_figure(evaluation: Evaluation) -> str:
    """Each method's gains over the reference at equal weights, an axis per objective; "" for three objectives or fewer.

    A panel per method, since shapes on top of each other can't be told apart. The dashed ring is the reference, no gain; what
    lies within it was lost. All panels share one scale, and a method with an unscored gain has none.
    """
    names = list(evaluation["objectives"])
    shown = []
    for point in evaluation.get("points") or []:
        weights = point.get("weights") or []
        gains = [number(entry(point.get("gain"), k).get("mean")) for k in range(len(names))]
        if weights and max(weights) - min(weights) < 1e-6 and None not in gains:
            n = point.get("n_candidates") or 1
            shown.append((point["method"] + (f" n={n}" if n > 1 else ""), [g for g in gains if g is not None]))
    if len(names) <= 3 or not shown:
        return ""
    every = [g for _, found in shown for g in found]
    bottom, top = min([*every, -0.1]) - 0.15, max([*every, 0.1])
    angles = [2 * math.pi * k / len(names) for k in range(len(names) + 1)]
    rows = math.ceil(len(shown) / _COLUMNS)
    with canvas(4.0, 0.1 + 2.0 * rows) as figure:
        axes = figure.subplots(rows, _COLUMNS, squeeze=False, subplot_kw={"projection": "polar"}).ravel()
        for ax in axes[len(shown) :]:
            ax.remove()
        for ax, (name, found) in zip(axes, shown, strict=False):
            _radar(ax, name, names, angles, [*found, found[0]], (bottom, top))
        return svg(figure, "radar", "gains on every objective at equal weights, a panel per method")


def _radar(ax: Any, name: str, names: Sequence[str], angles: Sequence[float], gains: Sequence[float], limits: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_theta_offset(math.pi / 2)
    around = [2 * math.pi * step / 90 for step in range(91)]
    ax.plot(around, [0.0] * len(around), color="0.3", linestyle="--", linewidth=0.8)
    ax.fill(angles, gains, color="#56B4E9", alpha=0.45)
    ax.plot(angles, gains, color="black", marker="o", markersize=2.5, linewidth=1.1)
    ax.set_xticks(angles[:-1], [short(n, 14) for n in names], fontsize=6.5)
    ax.tick_params(axis="y", labelsize=5.5)
    ax.set_yticks(MaxNLocator(3).tick_values(*limits)[1:-1])
    ax.set_ylim(*limits)
    ax.grid(color="0.85", linewidth=0.5)
    ax.set_title(short(name, 26), fontsize=7.5)
