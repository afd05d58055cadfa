"""What every figure shares: a style per method, the canvas, and SVG text that is the same bytes for the same input.

Text stays text, and every id is prefixed with the figure's name so that several figures fit into one page.
Colours: Okabe & Ito 2008.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]
"""One entry of an evaluation's `points`."""
Evaluation = Mapping[str, Any]
"""The content of an evaluation's JSON file."""

_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "equipoise",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a method is drawn: colour, marker and line each tell it apart."""

    colour: str
    marker: str
    line: Any
    filled: bool = True
    """Whether the marker is full of its colour, or white within."""


_STYLES = {
    "reference": Style(colour="#000000", marker="X", line="-"),
    "single-pass": Style(colour="#0072B2", marker="o", line="-"),
    "prefix": Style(colour="#009E73", marker="s", line="--"),
    "best-of-n": Style(colour="#D55E00", marker="^", line="-."),
    "resampling": Style(colour="#CC79A7", marker="D", line=":"),
}
# Five colours, twenty markers, five lines: no two of the first five unknown methods share a colour, nor of twenty a marker, so that
# they can be told apart in black and white.
_SPARE_COLOURS = ("#E69F00", "#56B4E9", "#5A5A5A", "#009E73", "#0072B2")
_SPARE_MARKERS = [(shape, True) for shape in "vP*<>pd"] + [(shape, False) for shape in "os^DvP*<>pdXh"]
_SIZES = {"*": 8.5, "P": 7.0, "d": 7.0}
"""Of thin markers, in points, so that they look as large as the others."""
_SPARE_LINES = ((0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (7, 3)), (0, (2, 1)))


def method_styles(evaluation: Evaluation) -> dict[str, Style]:
    """A style for each method of the evaluation; unknown methods take spare ones in the order of their first point."""
    styles: dict[str, Style] = {}
    spare = itertools.count()
    for point in evaluation.get("points") or []:
        name = point["method"]
        if name not in styles:
            styles[name] = _STYLES[name] if name in _STYLES else _spare_style(next(spare))
    return styles


def _spare_style(i: int) -> Style:
    marker, filled = _SPARE_MARKERS[i % len(_SPARE_MARKERS)]
    line = _SPARE_LINES[i % len(_SPARE_LINES)]
    return Style(colour=_SPARE_COLOURS[i % len(_SPARE_COLOURS)], marker=marker, line=line, filled=filled)


def number(value: Any) -> float | None:
    """A finite number, or None for what is unscored: None, NaN, infinity."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def entry(values: Sequence[Any] | None, index: int) -> Mapping[str, Any]:
    """The `index`-th {mean, lo, hi} of a list that may be short or hold None."""
    return (values[index] or {}) if values and index < len(values) else {}


def short(text: str, most: int = 30) -> str:
    """A label that fits; what XML can't hold and what turns the direction of text become spaces."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]", " ", text)
    return text if len(text) <= most else text[: most - 1] + "…"


def weights_text(weights: Sequence[float] | None) -> str:
    """ "0.75 / 0.25", or an en dash where there are none."""
    return " / ".join(f"{w:.3g}" for w in weights) if weights else "–"


def point_names(points: Sequence[Point]) -> list[str]:
    """A short name for each point, "best-of-n n=4 0.5/0.5"; its label where that would name several points."""
    names = []
    for point in points:
        n = point.get("n_candidates") or 1
        weights = "/".join(f"{w:.3g}" for w in point.get("weights") or [])
        names.append(" ".join(part for part in (point["method"], f"n={n}" if n > 1 else "", weights) if part))
    return [name if names.count(name) == 1 else point["label"] for name, point in zip(names, points, strict=True)]


@contextlib.contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches under the report's settings, which end with the block; pyplot's state is left alone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # The browser has the glyphs that the layout's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one `<svg>` element that scales to its box, its ids prefixed with `name`; call it inside `canvas`.

    An artist whose URL is "point:3" becomes a group with `data-point="3"`: a mark of the page, no link.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r'<a xlink:href="point:(\d+)"[^>]*>(.*?)</a>', r'<g data-point="\1">\2</g>', body, flags=re.DOTALL)
    body = re.sub(r'\b(id|xlink:href)="(#?)', rf'\1="\2{name}-', body).replace("url(#", f"url(#{name}-")
    return f'{head} role="img" aria-label="{escape(short(description, 200))}">{body}'


def bar(ax: Axes, interval: Mapping[str, Any], other: float, colour: str, *, horizontal: bool) -> None:
    """An interval as a thin line; drawn by hand since a percentile interval needn't contain the mean."""
    lo, hi = number(interval.get("lo")), number(interval.get("hi"))
    if lo is not None and hi is not None:
        ends, across = [lo, hi], [other, other]
        ax.plot(*((ends, across) if horizontal else (across, ends)), color=colour, linewidth=0.9, alpha=0.6, zorder=1)


def marker(style: Style) -> dict[str, Any]:
    """Keyword arguments of a method's marker; a full one has a white rim that keeps crowded points apart."""
    look: dict[str, Any] = {"marker": style.marker, "color": style.colour, "markersize": _SIZES.get(style.marker, 5.5)}
    if style.filled:
        return look | {"markeredgecolor": "white", "markeredgewidth": 0.5}
    return look | {"markerfacecolor": "white", "markeredgecolor": style.colour, "markeredgewidth": 1.2}


def legend(figure: Figure, evaluation: Evaluation, methods: Iterable[str]) -> None:
    """The methods' styles under the axes, each once, in the order given."""
    from matplotlib.lines import Line2D

    styles, names = method_styles(evaluation), list(dict.fromkeys(methods))
    lines = ["none" if name == "reference" else styles[name].line for name in names]
    handles = [Line2D([], [], linestyle=line, linewidth=1.3, **marker(styles[name])) for name, line in zip(names, lines, strict=True)]
    figure.legend(handles, [_wrapped(name) for name in names], loc="outside lower center", ncols=2, handlelength=3.4)


def legend_height(methods: Iterable[str]) -> float:
    """About how many inches `legend` takes."""
    lines = [_wrapped(name).count("\n") + 1 for name in dict.fromkeys(methods)]
    half = (len(lines) + 1) // 2
    return 0.1 + 0.165 * max(sum(lines[:half]), sum(lines[half:]))


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(short(name, 44), 22))


def log_ticks(ax: Axes) -> None:
    """Ticks at 1, 2, 5, 10 ... on a logarithmic x axis, written as multiples."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
