"""The report page: whole, self-contained, safe against hostile text, and honest about what is unscored."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from equipoise.evaluation.drawing import method_styles, point_names
from equipoise.evaluation.figures import bars_figure, front_figure, gain_per_compute_figure, gain_per_nat_figure
from equipoise.evaluation.headline import headline, verdict
from equipoise.evaluation.markup import MISSING, Html, decimal, element, embedded_json, flatten, interval, percent, pvalue, text
from equipoise.evaluation.report import render_report
from equipoise.types import UserError

NAN = float("nan")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & $\\frac{a}$ ]]> <!-- \u2028 \x00 \ud800 \u202eevil"
SECTIONS = ["front", "points", "hypervolume", "equal", "gain", "gaming", "examples", "values", "calibration", "how", "files"]
GRID = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]


def estimate(mean: float, half: float = 0.09) -> dict[str, float]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half}


def point(method: str, weights: tuple[float, ...] | None, strength: float, n: int = 1, **changes: Any) -> dict[str, Any]:
    """A point of a made-up front: each objective gains with its weight's root and pays for the other's."""
    a, b = weights or (0.0, 0.0)
    gains = [strength * (a**0.5 - 0.35 * b), strength * (b**0.5 - 0.25 * a)]
    label = method if weights is None else f"{method}{f' n={n}' if n > 1 else ''} helpful={a:g} harmless={b:g}"
    made = {
        "method": method,
        "label": label,
        "weights": None if weights is None else list(weights),
        "n_candidates": n,
        "reward": [estimate(g + 0.01) for g in gains],
        "judge": [estimate(0.7 * g, 0.12) for g in gains],
        "gain": [estimate(g, 0.07) for g in gains],
        "words": 74 + 40 * a * strength - 20 * b * strength,
        "refusals": 0.04 + 0.2 * b * strength,
        "truncated": 0.11,
        "kl": 0.0 if weights is None else 2.4 * strength,
        "kl_floor": 0.31,
        "cost": 1.0,
        "tokens_per_s": 41.5,
        "n": 400,
        "n_unscored": 0,
        "source": f"sweep/{method}/scores.parquet",
    }
    return made | changes


def examples() -> list[dict[str, Any]]:
    """Four prompts, more than the page shows, answered at longer length the more helpfulness weighs."""
    made = []
    for thing in ("wine", "ink", "wax", "glue"):
        responses = []
        for a, b in GRID:
            words = "Blot it, don't rub.\n\n1. Cold water first.\n2. Then a little soap.\n" * (1 + int(3 * a))
            responses.append({"label": f"helpful={a:g} harmless={b:g}", "text": words, "reward": [a, -b]})
        made.append({"prompt": f"How do I get {thing} out of a carpet?", "responses": responses})
    return made


def evaluation() -> dict[str, Any]:
    """A realistic evaluation: four methods and the reference on five weights."""
    points = [point("reference", None, 0.0)]
    points += [point("single-pass", w, 0.9, cost=1.25) for w in GRID]
    points += [point("prefix", w, 0.6, cost=1.1) for w in GRID]
    for n, strength in ((2, 0.4), (4, 0.65), (8, 0.85), (16, 1.0)):
        points += [point("best-of-n", w, strength, n=n, cost=float(n), kl=0.35 * strength * n**0.5) for w in GRID[::4]]
    points += [point("resampling", w, 0.7, n=4, cost=6.5) for w in GRID[::2]]
    row = {"objective": "helpful", "ours": "single-pass", "other": "best-of-n", "difference": estimate(0.25), "p": 0.0001}
    behind = row | {"objective": "harmless", "difference": estimate(-0.2), "p": 0.004}
    undecided = row | {"objective": "harmless", "difference": estimate(0.02), "p": 0.61}
    return {
        "title": "Helpful and harmless, one model",
        "model": "example/small-chat-360M",
        "objectives": ["helpful", "harmless"],
        "judges": ["judge_helpful", "judge_harmless"],
        "ref_point_K": [-1.0, -1.0],
        "sampling": {"temperature": 1.0, "top_k": 40, "max_new_tokens": 96, "seed": 0},
        "settings": {"prompts": 200, "samples": 2, "beta": 0.25, "value": {"layers": [8, 16], "loss": "td-lambda"}, "stop": None},
        "versions": {"python": "3.11.7", "equipoise": "0.1.0", "torch": "2.13.0"},
        "points": points,
        "hypervolume": [
            {"method": m, "cost": c, "value": v, "lo": v - 0.12, "hi": v + 0.11}
            for m, c, v in [("single-pass", 1.25, 2.91), ("prefix", 1.1, 2.2), ("best-of-n", 4.0, 2.31), ("resampling", 6.5, 2.4)]
        ],
        "equal_compute": [row | {"cost": 1.25}, behind | {"cost": 1.25}],
        "equal_kl": [row | {"kl": 1.4}, undecided | {"kl": 1.4}],
        "examples": examples(),
        "values": [
            {"form": form, "objective": name, "r2": 0.31 + 0.1 * i, "r2_by_position": [[0, 0.1], [8, 0.2], [32, 0.4], [64, 0.55]]}
            for form in ("linear", "two-layer")
            for i, name in enumerate(["helpful", "harmless"])
        ],
        "calibration": [{"weights": list(w), "asked": 2.0, "realised": 2.0 + 0.1 * i} for i, w in enumerate(GRID)],
        "files": [{"path": f"sweep/{m}/scores.parquet", "sha256": f"{i}" * 64, "what": f"scores of {m}"} for i, m in enumerate(["a", "b"])],
    }


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts and styles, the scripts' contents."""

    def __init__(self, html: str) -> None:
        """Parse the whole page."""
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        (self.scripts if inside == "script" else self.text).append(data)

    def ids(self) -> list[str]:
        """Every id of the page, in order."""
        return [attributes["id"] or "" for _, attributes in self.tags if "id" in attributes]

    def data(self) -> Any:
        """The embedded evaluation."""
        return json.loads(next(s for s in self.scripts if s.lstrip().startswith("{")))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report(evaluation()))


def hostile(value: Any) -> Any:
    """Every string of an evaluation with hostile text behind it, keys and the names that must match kept."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def unscored(value: Any) -> Any:
    """Every float of an evaluation as None."""
    if isinstance(value, dict):
        return {k: v if k in ("weights", "n_candidates", "settings", "sampling") else unscored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [unscored(v) for v in value]
    return None if isinstance(value, float) else value


def test_every_section_is_there_in_order(page: Page) -> None:
    assert [i for i in page.ids() if i in ["headline", *SECTIONS]] == ["headline", *SECTIONS]
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + 2 + 2 + 1


def test_ids_are_unique_and_references_hit(page: Page) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = [v for _, a in page.tags for k, v in a.items() if k in ("href", "xlink:href") and v]
    targets += [t for _, a in page.tags for v in a.values() for t in re.findall(r"url\((#[^)]*)\)", v or "")]
    assert targets
    assert all(t.startswith("#") and t[1:] in ids for t in targets)


def test_nothing_is_loaded(page: Page) -> None:
    html = render_report(evaluation())
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", without_namespaces)
    assert not any(key in a for _, a in page.tags for key in ("src", "srcset", "action", "background"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})


@pytest.mark.parametrize(
    ("empty", "gone"),
    [
        ("points", ["front", "points", "gain", "gaming"]),
        ("hypervolume", ["hypervolume"]),
        ("examples", ["examples"]),
        ("values", ["values"]),
        ("calibration", ["calibration"]),
        ("files", ["files"]),
        ("judges", []),
    ],
)
def test_a_section_with_nothing_to_show_is_left_out(empty: str, gone: list[str]) -> None:
    ids = Page(render_report(evaluation() | {"points": evaluation()["points"][:3]} | {empty: []})).ids()
    assert [s for s in SECTIONS if s not in ids] == gone


@pytest.mark.parametrize(("empty", "gone"), [(("equal_kl",), []), (("equal_kl", "equal_compute"), ["equal"])])
def test_either_comparison_keeps_its_section(empty: tuple[str, ...], gone: list[str]) -> None:
    ids = Page(render_report(evaluation() | {"points": evaluation()["points"][:3]} | {key: [] for key in empty})).ids()
    assert [s for s in SECTIONS if s not in ids] == gone


def test_one_objective_has_no_front() -> None:
    one = point("single-pass", (1.0, 0.0), 0.9) | {"weights": [1.0]}
    ids = Page(render_report(evaluation() | {"objectives": ["helpful"], "judges": ["judge_helpful"], "points": [one]})).ids()
    assert "front" not in ids
    assert "gain" in ids
    assert "gaming" in ids


def test_an_empty_evaluation_still_makes_a_page() -> None:
    page = Page(render_report({"title": "Nothing yet", "model": "none", "objectives": []}))
    assert [i for i in page.ids() if i in ["headline", *SECTIONS]] == []
    assert page.data() == {"title": "Nothing yet", "model": "none", "objectives": []}


def test_hostile_text_stays_text() -> None:
    html = render_report(hostile(evaluation()))
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert html.count("<script") == html.count("</script") == 2
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "base", "iframe"})
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert "<img src=x onerror=alert(2)>" in "".join(page.text)
    html.encode("utf-8")
    assert not re.search("[\x00\u202e]", html)


def test_the_evaluation_reads_back_out_of_the_page(page: Page) -> None:
    assert page.data() == evaluation()
    odd = hostile(evaluation()) | {"points": [], "extra": [NAN, float("inf"), 1.5]}
    assert Page(render_report(odd)).data() == odd | {"extra": [None, None, 1.5]}


def test_unscored_is_an_en_dash_and_never_zero() -> None:
    made = unscored(evaluation())
    html = render_report(made)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><th scope=.row.*?</tr>", html[: html.index('id="how"')])]
    points = [row for row in rows if len(row) == 17]
    assert len(points) == len(made["points"])
    assert {cell for row in points for cell in row[1:14]} == {MISSING}
    rest = {cell for row in rows if len(row) < 17 for cell in row}
    assert rest == {MISSING, "unscored", "single-pass − best-of-n"}
    assert set(Page(html).ids()).isdisjoint({"headline", "front", "gain", "gaming"})
    assert not front_figure(made, "helpful", "harmless")
    assert not bars_figure(made)
    assert not gain_per_nat_figure(made)
    assert not gain_per_compute_figure(made)


def test_one_unscored_value_among_scored_ones() -> None:
    made = evaluation()
    made["points"] = [point("single-pass", (1.0, 0.0), 0.9), point("single-pass", (0.0, 1.0), 0.9)]
    made["points"][0] |= {"words": NAN, "refusals": None, "judge": [None, estimate(0.5)], "reward": [estimate(NAN), estimate(0.2)]}
    rows = re.findall(r"<tr><th scope=.row.>single-pass.*?</tr>", render_report(made))
    cells = re.findall(r"<td>(.*?)</td>", rows[0])
    assert [cells[i] for i in (1, 5, 7, 8)] == [MISSING] * 4
    assert MISSING not in "".join(re.findall(r"<td>(.*?)</td>", rows[1]))
    assert bars_figure(made).count(f">{MISSING}<") == 2


def test_numbers() -> None:
    assert [decimal(v) for v in (0.126, -0.004, -1.5, 0, None, NAN, float("inf"))] == ["0.13", "0.00", "−1.50", "0.00"] + [MISSING] * 3
    assert [decimal(v, sign=True) for v in (0.5, -0.5, 0.001, None)] == ["+0.50", "−0.50", "0.00", MISSING]
    assert [percent(v) for v in (0.126, None)] == ["13\u00a0%", MISSING]
    assert [pvalue(v) for v in (0.00001, 0.0314, None)] == ["< 0.001", "0.031", MISSING]
    assert interval({"mean": 1, "lo": None, "hi": 2}) == "1.00"
    assert interval({"mean": None, "lo": 0, "hi": 2}) == interval(None) == MISSING
    assert re.sub("<.*?>", "", interval(estimate(0.5, 0.1), sign=True)) == "+0.50 [+0.40, +0.60]"
    nested = {"a": {"b": [1, NAN], "c": {}}, "d": None, "e": "x"}
    assert flatten(nested) == [("a.b", "[1, null]"), ("a.c", "{}"), ("d", MISSING), ("e", "x")]


def test_markup_escapes_all_but_html() -> None:
    assert element("p", "<b>", Html("<i>"), None, class_='"') == '<p class="&quot;">&lt;b&gt;<i>' + MISSING + "</p>"
    assert text("a\x00b\ud800") == "a\ufffdb\ufffd"
    encoded = embedded_json({"a": "</script><!-- & \u2028"})
    assert not re.search("[<>&\u2028]", encoded)
    assert json.loads(encoded) == {"a": "</script><!-- & \u2028"}


def test_headline_says_what_was_found() -> None:
    ends, compute, kl = (sentence.replace("\u00a0", " ") for sentence in headline(evaluation()))
    assert "single-pass gains over the reference +0.90 sd in helpful (95 % interval +0.83 to +0.97) and +0.90 sd in harmless" in ends
    assert compute == (
        "At equal compute, single-pass is ahead of best-of-n on helpful (1.25× a plain response) by 0.25 sd, 95 % interval +0.16 to +0.34; "
        "and best-of-n is ahead of single-pass on harmless (1.25× a plain response) by 0.20 sd, 95 % interval +0.11 to +0.29."
    )
    assert kl.endswith("single-pass and best-of-n can't be told apart on harmless (1.40 nats): +0.02 sd, 95 % interval −0.07 to +0.11.")


def test_headline_of_many_comparisons_counts_and_names_the_losses() -> None:
    made = evaluation()
    won, lost = made["equal_compute"]
    made["equal_compute"] = [won, won, lost, won, lost, made["equal_kl"][1] | {"cost": 2.0}, won | {"difference": None}]
    assert headline(made)[1] == (
        "At equal compute, single-pass is ahead in 3 of 6 comparisons, behind in 2 (best-of-n on harmless at 1.25× a plain response, "
        "best-of-n on harmless at 1.25× a plain response) and undecided in 1."
    )
    made["equal_compute"] = [won, won, lost, won, lost | {"ours": "prefix"}]
    assert headline(made)[1] == (
        "At equal compute, single-pass and prefix are ahead in 3 of 5 comparisons, behind in 2 (single-pass to best-of-n on harmless at "
        "1.25× a plain response, prefix to best-of-n on harmless at 1.25× a plain response) and undecided in 0."
    )


def test_headline_of_an_unclear_gain() -> None:
    made = evaluation() | {"equal_kl": [], "equal_compute": []}
    made["points"][1]["gain"][0] = estimate(0.02, 0.1)
    sentence = " ".join(headline(made)).replace("\u00a0", " ")
    assert "+0.02 sd in helpful (95 % interval −0.08 to +0.12, so no clear change)" in sentence


def test_verdict_needs_an_interval_on_one_side_of_zero() -> None:
    row = {"ours": "a", "other": "b"}
    found = [verdict(row | {"difference": d}) for d in (estimate(1), estimate(-1), estimate(0), estimate(NAN), None)]
    assert found == ["a", "b", "undecided", "unscored", "unscored"]


def draw_front(made: dict[str, Any]) -> str:
    return front_figure(made, "helpful", "harmless")


@pytest.mark.parametrize("draw", [draw_front, gain_per_nat_figure, gain_per_compute_figure, bars_figure])
def test_figures_are_well_formed_and_repeat(draw: Any) -> None:
    for made in (evaluation(), hostile(evaluation()) | {"objectives": ["helpful", "harmless"]}):
        svg = draw(made)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert svg == draw(copy.deepcopy(made))
        assert not re.search(r"<metadata|<date|\d{4}-\d\d-\d\dT", svg)
        assert "<text" in svg


def test_figures_mark_what_the_reader_needs() -> None:
    front = front_figure(evaluation(), "helpful", "harmless")
    assert all(f">{words}<" in front for words in ("all helpful", "all harmless", "reference", "single-pass", "best-of-n", "n=16"))
    swapped = front_figure(evaluation(), "harmless", "helpful")
    assert ">all helpful<" in swapped
    assert ">all harmless<" in swapped
    gain = gain_per_nat_figure(evaluation())
    assert all(f">n={n}<" in gain for n in (2, 4, 8, 16))
    assert ">all weight on harmless<" in gain
    assert ">all weight on harmless<" not in gain_per_nat_figure(evaluation(), ["helpful"])
    assert ">2×<" in gain_per_compute_figure(evaluation())


def test_figures_refuse_unknown_names() -> None:
    with pytest.raises(UserError, match="two objectives or two judges"):
        front_figure(evaluation(), "helpful", "judge_harmless")
    with pytest.raises(UserError, match="unknown objective 'kind'"):
        gain_per_nat_figure(evaluation(), ["kind"])


def test_points_are_named_shortly_unless_that_is_ambiguous() -> None:
    points = [point("prefix", (0.5, 0.5), 1.0), point("best-of-n", (1 / 3, 2 / 3), 1.0, n=4), point("reference", None, 0.0)]
    assert point_names(points) == ["prefix 0.5/0.5", "best-of-n n=4 0.333/0.667", "reference"]
    twins = [points[0] | {"label": "prefix, beta 1"}, points[0] | {"label": "prefix, beta 2"}]
    assert point_names(twins) == ["prefix, beta 1", "prefix, beta 2"]
    assert all(f"<small>prefix, beta {b}</small>" in render_report(evaluation() | {"points": twins}) for b in (1, 2))


def test_three_objectives_join_only_an_edge_of_the_simplex() -> None:
    made = evaluation() | {"objectives": ["helpful", "harmless", "brief"], "judges": []}
    corner = {"reward": [estimate(0.1), estimate(0.2), estimate(0.3)], "gain": [estimate(0.1)] * 3}
    made["points"] = [point("single-pass", (0.5, 0.5), 1.0) | corner | {"weights": w} for w in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    assert Page(render_report(made)).ids().count("front") == 1
    assert "all brief" not in front_figure(made, "helpful", "harmless")
    assert "all brief" in front_figure(made, "helpful", "brief")


def test_methods_look_different_and_the_same_everywhere() -> None:
    names = ["mixing", "single-pass", "soup", "best-of-n", "beam", "rewarded"]
    styles = method_styles({"points": [point(name, (1.0, 0.0), 1.0) for name in names]})
    for feature in ("marker", "line"):
        assert len({getattr(style, feature) for style in styles.values()}) == len(names)
    assert styles["single-pass"] == method_styles(evaluation())["single-pass"]


def test_twenty_unknown_methods_differ_in_black_and_white() -> None:
    known = ["reference", "single-pass", "prefix", "best-of-n", "resampling"]
    styles = method_styles({"points": [point(name, (1.0, 0.0), 1.0) for name in [*known, *(f"m{i}" for i in range(20))]]})
    assert len({(style.marker, style.filled) for style in styles.values()}) == 25


def test_importing_the_report_loads_no_plotting() -> None:
    code = "import sys, equipoise.evaluation.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
