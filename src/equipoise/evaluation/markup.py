"""Numbers, tables and JSON as HTML: whatever isn't marked as HTML already is escaped on its way in.

An unscored number is an en dash, never 0; a negative one has a real minus sign.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from equipoise.evaluation.drawing import number

MISSING = "–"
"""What stands for an unscored number."""

# What HTML can't hold (control characters, lone surrogates, which also break UTF-8, and non-characters), and what turns the
# direction of the text behind it, so that a name could make 0.25 read 52.0.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Text that is HTML already; everything else is escaped where it meets a page."""


def printable(value: str) -> str:
    """The text with U+FFFD for what a page can't hold or what turns the direction of text."""
    return _UNPRINTABLE.sub("\ufffd", value)


def text(value: object) -> Html:
    """Escaped text; HTML stays as it is, None is an en dash."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(MISSING if value is None else str(value))))


def element(tag: str, *children: object, **attributes: str) -> Html:
    """`<tag attribute="…">children</tag>`; a trailing underscore of an attribute's name is dropped (`class_`)."""
    opening = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{opening}>{''.join(text(child) for child in children)}</{tag}>")


def join(*parts: object) -> Html:
    """One after the other."""
    return Html("".join(text(part) for part in parts))


def note(*parts: object) -> Html:
    """A paragraph that explains what stands below it."""
    return element("p", *parts, class_="soft")


def decimal(value: Any, digits: int = 2, sign: bool = False) -> str:
    """A number with so many decimals, or an en dash; what rounds to zero has no sign."""
    found = number(value)
    if found is None:
        return MISSING
    rounded = f"{found:.{digits}f}"
    if float(rounded) == 0:
        return rounded.lstrip("-")
    return ("+" if sign and found > 0 else "") + rounded.replace("-", "−")


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage, or an en dash."""
    found = number(value)
    return MISSING if found is None else f"{decimal(100 * found, digits)}\u00a0%"


def multiple(value: Any) -> str:
    """A multiple of something, "1.25×", or an en dash."""
    return decimal(value) + ("" if number(value) is None else "×")


def pvalue(value: Any) -> str:
    """Three decimals, "< 0.001" below that."""
    found = number(value)
    return "< 0.001" if found is not None and found < 0.001 else decimal(found, 3)


def interval(estimate: Mapping[str, Any] | None, digits: int = 2, sign: bool = False, key: str = "mean") -> Html:
    """`0.62 [0.51, 0.73]`, without brackets where the interval is unknown, an en dash where the value is."""
    estimate = estimate or {}
    value = text(decimal(estimate.get(key), digits, sign))
    ends = [decimal(estimate.get(end), digits, sign) for end in ("lo", "hi")]
    if value == MISSING or MISSING in ends:
        return value
    return Html(f"{value} {element('span', f'[{ends[0]}, {ends[1]}]', class_='ci')}")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], groups: Sequence[tuple[str, int]] = (), name: str = "") -> Html:
    """A table in a box that scrolls sideways, its first column kept in sight; `groups` are (title, columns) over the head.

    An empty table is an empty string.
    """
    body = [element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows]
    if not body:
        return Html("")
    over = element("tr", *(element("th", title, colspan=str(span), scope="colgroup") for title, span in groups)) if groups else ""
    top = element("thead", over, element("tr", *(element("th", cell, scope="col") for cell in head)))
    return element("div", element("table", top, element("tbody", *body)), class_="scroll", tabindex="0", role="region", aria_label=name)


def figures(*drawn: tuple[str, object]) -> Html:
    """(SVG, caption) pairs side by side where there is room; empty ones are left out."""
    cards = [element("figure", element("div", Html(svg)), element("figcaption", caption)) for svg, caption in drawn if svg]
    return element("div", *cards, class_="figures") if cards else Html("")


def folded(title: object, *parts: object) -> Html:
    """Parts that open under their title; printed as they stand."""
    return element("details", element("summary", title), *parts)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("a.b", "value") rows; lists in JSON, None an en dash."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows.extend(flatten(value, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else _setting(value)))
    return rows


def _setting(value: Any) -> str:
    return MISSING if value is None else json.dumps(_finite(value), ensure_ascii=False, default=str)


def embedded_json(value: Any) -> Html:
    """JSON that is safe inside a `<script>` and reads back as the same value; NaN and infinity become null."""
    encoded = json.dumps(_finite(value), allow_nan=False, default=str)
    return Html(encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
