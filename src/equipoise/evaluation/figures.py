"""Figures of an evaluation as SVG text, for the report or for a file of their own.

Each function takes the evaluation (the content of its JSON file) and returns one `<svg>` element without an XML header,
or "" where there is nothing to draw. Unscored values are left out, never drawn at 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from equipoise.evaluation.drawing import (
    Evaluation,
    Point,
    Style,
    bar,
    canvas,
    entry,
    legend,
    legend_height,
    log_ticks,
    marker,
    method_styles,
    number,
    point_names,
    short,
    svg,
)
from equipoise.objectives import on_face
from equipoise.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Placed = tuple[Point, tuple[float, float]]
"""A point with its place on the axes."""

_WIDTH = 4.0
"""Inches. A little less than a phone's width, so that text is as large there as that of the page's notes."""
MANY_POINTS = 60
"""More points than this don't stand side by side in one figure."""
_HALO = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.65}
_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": "0.25", "zorder": 5, "bbox": _HALO}


def own_objective(point: Point) -> int | None:
    """The objective that holds all of a point's weight, or None for a mixture and for no weights."""
    return next((k for k, w in enumerate(point.get("weights") or []) if w > 1 - 1e-9), None)


def front_figure(evaluation: Evaluation, x: str, y: str, points: Sequence[Point] | None = None, name: str = "") -> str:
    """Points of each method on two objectives (or two judges), with 95 % interval bars and a line along the weights.

    `x` and `y` name two of the evaluation's objectives or two of its judges. With more than two objectives only the points
    whose weight lies on the two drawn ones are shown, one edge of the simplex, and for judges those with all weight on one.
    `points`: which to draw, None for the evaluation's; a method looks the same whatever stands beside it. One that has an
    `index` is marked with it (`drawing.svg`). `name` tells several figures of one page apart. Raises `UserError` for an
    unknown objective or judge.
    """
    key, i, j = _axes_of(evaluation, x, y)
    every = evaluation.get("points") or [] if points is None else points
    shown = [p for p in every if drawn_on(p, key, (i, j))]
    placed = [(p, place) for p in shown if (place := _place(p, key, i, j)) is not None]
    if not placed:
        return ""
    with canvas(_WIDTH, 3.4 + legend_height(p["method"] for p, _ in placed)) as figure:
        ax = figure.add_subplot()
        styles, series = method_styles(evaluation), list(_series(placed))
        named = max(range(len(series)), key=lambda s: (sum(bool(p.get("weights")) for p, _ in series[s][2]), -s))
        several = {m for m in styles if len({p.get("n_candidates") for p, _ in placed if p["method"] == m}) > 1}
        for method, n, group in series:
            style = styles[method]
            _front_points(ax, group, style, key, i, j)
            line = [(p, place) for p, place in group if _on_edge(p, evaluation["objectives"], key, i, j)]
            if len(line) > 1:
                ax.plot(*zip(*(place for _, place in line), strict=True), color=style.colour, linestyle=style.line, linewidth=1.3, zorder=2)
                if method in several:
                    ax.annotate(f"n={n}", line[-1][1], xytext=(-3, 3), ha="right", va="bottom", **_NOTE)
        _name_ends(ax, [q for q in series[named][2] if _on_edge(q[0], evaluation["objectives"], key, i, j)], evaluation["objectives"])
        ax.set(xlabel=f"{short(x, 20)} (sd of the reference)", ylabel=f"{short(y, 20)} (sd of the reference)")
        ax.margins(0.13)
        _mark_origin(ax, any(p["method"] == "reference" for p, _ in placed))
        legend(figure, evaluation, (p["method"] for p, _ in placed))
        return svg(figure, f"front-{key}-{i}-{j}{name}", f"{x} against {y}, a point for each method and its weights")


def drawn_on(point: Point, key: str, pair: tuple[int, int]) -> bool:
    """Whether a front on these two axes shows the point: its weights lie on the two objectives; beside judges, on one of several."""
    weights = point.get("weights") or []
    return on_face(weights, pair) if key == "reward" else len(weights) <= 2 or own_objective(point) is not None


def gain_per_nat_figure(evaluation: Evaluation, objectives: Sequence[str] | None = None) -> str:
    """Gain over the reference against KL in nats, for the points with all weight on one objective: a panel for each.

    `objectives` chooses the panels; None draws all that have points, one above the other.
    """
    return _gain_figure(evaluation, objectives, "kl", "KL to the reference, nats per response (floor left out)")


def gain_per_compute_figure(evaluation: Evaluation, objectives: Sequence[str] | None = None) -> str:
    """`gain_per_nat_figure` against the cost relative to one plain response, on a log scale."""
    return _gain_figure(evaluation, objectives, "cost", "cost, multiples of one plain response (log scale)")


def bars_figure(evaluation: Evaluation) -> str:
    """Rewards, length and refusal rate beside each other, a row per point: what a gain may have been bought with.

    Of more than `MANY_POINTS` points only those with all weight on one objective, and the reference.
    """
    points = list(evaluation.get("points") or [])
    if len(points) > MANY_POINTS:
        points = [p for p in points if not p.get("weights") or own_objective(p) is not None]
    columns = [("words", "words", 1), ("refusals", "refusals, %", 100)]
    columns = [c for c in columns if any(number(p.get(c[0])) is not None for p in points)]
    if not columns:
        return ""
    with canvas(1.1 * _WIDTH, 1.0 + 0.2 * len(points)) as figure:
        axes = figure.subplots(1, 1 + len(columns), sharey=True, width_ratios=[1.5] + [1] * len(columns))
        _reward_dots(axes[0], evaluation["objectives"], points)
        for ax, (key, title, scale) in zip(axes[1:], columns, strict=True):
            _bars(ax, [number(p.get(key)) for p in points], scale, [method_styles(evaluation)[p["method"]] for p in points])
            ax.set_title(title)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.tick_params(axis="x", labelsize=7.5)
        axes[0].set_yticks(range(len(points)), [short(name, 28) for name in point_names(points)], fontsize=7.5)
        axes[0].set_ylim(len(points) - 0.5, -0.5)
        return svg(figure, "bars", "rewards, words and refusal rate of each point")


def _bars(ax: Axes, values: Sequence[float | None], scale: float, styles: Sequence[Style]) -> None:
    """Horizontal bars with their numbers; an unscored one is an en dash, which can't be taken for a bar of length 0."""
    for row, (value, style) in enumerate(zip(values, styles, strict=True)):
        if value is not None:
            ax.barh(row, scale * value, height=0.62, color=style.colour)
        text = "–" if value is None else f"{scale * value:.0f}"
        ax.annotate(text, (scale * (value or 0), row), xytext=(2, 0), va="center", **_NOTE)
    ax.set_xlim(0, 1.3 * max([scale * v for v in values if v is not None] + [1.0]))


def _reward_dots(ax: Axes, objectives: Sequence[str], points: Sequence[Point]) -> None:
    """One row per point, objectives told apart by marker and fill and set a little apart in height."""
    ax.axvline(0, color="0.75", linewidth=0.7, zorder=0)
    handles = []
    for k in range(len(objectives)):
        fill = "white" if k % 2 else "black"
        look: dict[str, Any] = {"linestyle": "none", "marker": "osD^v"[k % 5], "color": "black", "markerfacecolor": fill, "markersize": 3.6}
        shift = 0.36 * (k / max(len(objectives) - 1, 1) - 0.5)
        handles.append(ax.plot([], [], **look)[0])
        for row, point in enumerate(points):
            interval = entry(point.get("reward"), k)
            mean = number(interval.get("mean"))
            if mean is not None:
                bar(ax, interval, row + shift, "0.3", horizontal=True)
                ax.plot([mean], [row + shift], **look)
    ax.set_title("rewards, sd")
    ax.figure.legend(handles, [short(name, 18) for name in objectives], loc="outside lower center", ncols=min(len(objectives), 3))


def _gain_figure(evaluation: Evaluation, objectives: Sequence[str] | None, key: str, label: str) -> str:
    names = list(evaluation["objectives"])
    panels = []
    for name in names if objectives is None else objectives:
        if name not in names:
            raise UserError(f"unknown objective {name!r}; known: {', '.join(names)}")
        k = names.index(name)
        placed = [(p, place) for p in evaluation.get("points") or [] if own_objective(p) == k and (place := _gain(p, key)) is not None]
        if placed:
            panels.append((k, placed))
    if not panels:
        return ""
    named = [p["method"] for _, placed in panels for p, _ in placed]
    with canvas(_WIDTH, 0.2 + 2.6 * len(panels) + legend_height(named)) as figure:
        for ax, (k, placed) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _gain_panel(ax, placed, method_styles(evaluation), k, key)
            ax.set(title=f"all weight on {short(names[k])}", xlabel=label, ylabel=f"gain in {short(names[k], 20)}, sd")
        legend(figure, evaluation, named)
        return svg(figure, f"gain-{key}-{'-'.join(str(k) for k, _ in panels)}", f"gain over the reference against {label}")


def _gain_panel(ax: Axes, placed: Sequence[_Placed], styles: Mapping[str, Style], k: int, key: str) -> None:
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for method in dict.fromkeys(p["method"] for p, _ in placed):
        group = sorted((q for q in placed if q[0]["method"] == method), key=lambda q: q[1])
        style = styles[method]
        ax.plot(*zip(*(place for _, place in group), strict=True), color=style.colour, linestyle=style.line, linewidth=1.3, zorder=2)
        for point, (x, y) in group:
            bar(ax, entry(point.get("gain"), k), x, style.colour, horizontal=False)
            ax.plot([x], [y], linestyle="none", **marker(style), zorder=3)
            if (point.get("n_candidates") or 1) > 1:
                ax.annotate(f"n={point['n_candidates']}", (x, y), xytext=(4, -9), **_NOTE)
    ax.margins(0.1)
    if key == "cost":
        log_ticks(ax)
    else:
        ax.set_xlim(left=0)


def _gain(point: Point, key: str) -> tuple[float, float] | None:
    """(x, gain on the point's own objective), or None where one is unscored or can't stand on the scale."""
    place, k = number(point.get(key)), own_objective(point)
    gain = None if k is None else number(entry(point.get("gain"), k).get("mean"))
    if place is None or gain is None or (key == "cost" and place <= 0):
        return None
    return place, gain


def _axes_of(evaluation: Evaluation, x: str, y: str) -> tuple[str, int, int]:
    objectives, judges = list(evaluation["objectives"]), list(evaluation.get("judges") or [])
    for key, names in (("reward", objectives), ("judge", judges)):
        if x in names and y in names:
            return key, names.index(x), names.index(y)
    raise UserError(f"a front needs two objectives or two judges, got {x!r} and {y!r}; known: {', '.join(objectives + judges)}")


def _place(point: Point, key: str, i: int, j: int) -> tuple[float, float] | None:
    x, y = (number(entry(point.get(key), k).get("mean")) for k in (i, j))
    return None if x is None or y is None else (x, y)


def _series(placed: Sequence[_Placed]) -> Iterator[tuple[str, int, list[_Placed]]]:
    """(method, candidates, points along the weights): what one line joins; the reference last, on top."""
    keys = dict.fromkeys((p["method"], p.get("n_candidates") or 1) for p, _ in placed)
    for method, n in sorted(keys, key=lambda key: key[0] == "reference"):
        group = [q for q in placed if (q[0]["method"], q[0].get("n_candidates") or 1) == (method, n)]
        yield method, n, sorted(group, key=lambda q: tuple(q[0].get("weights") or ()), reverse=True)


def _front_points(ax: Axes, group: Sequence[_Placed], style: Style, key: str, i: int, j: int) -> None:
    for point, (x, y) in group:
        bar(ax, entry(point[key], i), y, style.colour, horizontal=True)
        bar(ax, entry(point[key], j), x, style.colour, horizontal=False)
        url: dict[str, Any] = {"url": f"point:{point['index']}"} if "index" in point else {}
        ax.plot([x], [y], linestyle="none", **marker(style), **url, zorder=3)


def _on_edge(point: Point, objectives: Sequence[str], key: str, i: int, j: int) -> bool:
    """Whether the line goes through this point: it has weights, and they lie on the two drawn objectives."""
    weights = point.get("weights")
    if not weights or (key == "judge" and len(objectives) > 2):
        return False
    return len(objectives) == 2 or on_face(weights, (i, j))


def _name_ends(ax: Axes, line: Sequence[_Placed], objectives: Sequence[str]) -> None:
    """Write "all helpful" over or under all points, tied to an end of the line that holds all of the weight."""
    low, high = ax.dataLim.y0, ax.dataLim.y1
    above: list[bool] = []
    for end, beside in ((0, 1), (-1, -2)) if len(line) > 1 else ():
        point, (x, y) = line[end]
        k = own_objective(point)
        if k is not None:
            # Two names on one side would lie on each other.
            above.append(not above[0] if above else y >= line[beside][1][1])
            ax.annotate(
                f"all {short(objectives[k], 16)}",
                (x, y),
                xytext=(x, high + 0.06 * (high - low) if above[-1] else low - 0.06 * (high - low)),
                ha="right" if x >= line[beside][1][0] else "left",
                va="center",
                fontweight="bold",
                arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )


def _mark_origin(ax: Axes, measured: bool) -> None:
    """Cross lines through the reference's mean, and a mark there unless the reference was `measured` as a point."""
    ax.axhline(0, color="0.75", linewidth=0.7, zorder=0)
    ax.axvline(0, color="0.75", linewidth=0.7, zorder=0)
    if not measured:
        ax.plot([0], [0], marker="+", color="black", markersize=9, linestyle="none", zorder=4)
    ax.annotate("reference", (0, 0), xytext=(5, -5), va="top", **_NOTE)
