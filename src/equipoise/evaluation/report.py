"""One self-contained HTML page of an evaluation: what was found, every number behind it, and the files they came from.

Reads the evaluation (a dict, the content of its JSON file) and returns text; nothing is loaded from anywhere, and the
page's policy forbids it. Texts of users and models are escaped. A section with nothing to show is left out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from equipoise.evaluation.drawing import Evaluation, Point, entry, number, point_names, weights_text
from equipoise.evaluation.figures import bars_figure, gain_per_compute_figure, gain_per_nat_figure
from equipoise.evaluation.fronts_report import at_kl_section, classes_section, faces_section, front_section
from equipoise.evaluation.headline import headline, price_of, verdict
from equipoise.evaluation.markup import (
    Html,
    decimal,
    element,
    embedded_json,
    figures,
    flatten,
    folded,
    interval,
    join,
    multiple,
    note,
    percent,
    pvalue,
    table,
    text,
)
from equipoise.evaluation.method_report import between_section, equal_length_table, hypervolume_section, methods_section, slips_table
from equipoise.evaluation.profile_figures import distribution_figure, radar_figure
from equipoise.evaluation.responses import SCRIPT, Responses, dialog, marked, opener
from equipoise.evaluation.win_rates import win_rates_section

_EXAMPLES = 3
_FILES = 20
"""Most rows of the table of files that stand open."""
_SCRIPT = """
const button = document.getElementById("download");
button.hidden = false;
button.addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([document.getElementById("evaluation").textContent], {type: "application/json"}));
  link.download = "evaluation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
"""
_SCRIPT += SCRIPT


def render_report(evaluation: dict[str, Any], responses: Responses | None = None) -> str:
    """The page as text; the evaluation itself is embedded as JSON and can be saved through a button.

    With `responses` (`responses.responses_of`) a click on a point, in the table or in a figure, shows what it said.
    Floats that are None or NaN are unscored and shown as an en dash. Raises `KeyError` where `title`, `model` or
    `objectives` is missing, or a point's `method` or `label`.
    """
    data, evaluation = evaluation, marked(evaluation, responses) if responses else evaluation
    sections = [
        ("front", "The front", front_section(evaluation)),
        ("classes", "At about the same cost", classes_section(evaluation)),
        ("at_kl", "At the same KL", at_kl_section(evaluation)),
        ("faces", "Two objectives at a time", faces_section(evaluation)),
        ("profile", "All objectives at equal weights", _profile(evaluation)),
        ("points", "All points", _points(evaluation)),
        ("hypervolume", "Hypervolume", hypervolume_section(evaluation)),
        ("methods", "Metrics of the fronts", methods_section(evaluation)),
        ("between", "Methods side by side", between_section(evaluation)),
        ("equal", "At equal KL and at equal compute", _equal(evaluation)),
        ("win_rates", "Win rates before a judge", win_rates_section(evaluation)),
        ("gain", "What a nat and a token buy", _gain(evaluation)),
        ("distributions", "What single responses are worth", _distributions(evaluation)),
        ("gaming", "Length and refusals", _gaming(evaluation)),
        ("examples", "Examples", _examples(evaluation)),
        ("values", "Quality of the value heads", _values(evaluation)),
        ("calibration", "KL asked for and realised", _calibration(evaluation)),
        ("how", "How it was made", _how(evaluation)),
        ("files", "Files", _files(evaluation)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = [element("a", title, href=f"#{name}") for name, title, _ in shown]
    body = [
        element("h1", evaluation["title"]),
        element("p", f"{evaluation['model']} · {', '.join(evaluation['objectives'])}", class_="soft"),
        _headline(evaluation),
        element("nav", *links, aria_label="Sections") if links else "",
        Html('<button id="download" type="button" hidden>Save the data (JSON)</button>'),
        *(element("section", element("h2", title), content, id=name) for name, title, content in shown),
        Html(f'<script id="evaluation" type="application/json">{embedded_json(data)}</script>'),
        dialog(responses) if responses else "",
        Html(f"<script>{_SCRIPT}</script>"),
    ]
    opening = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *_head(evaluation), "</head>", "<body>"]
    return "\n".join([*opening, *map(text, body), "</body>", "</html>", ""])


def _head(evaluation: Evaluation) -> list[str]:
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    style = files("equipoise.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", evaluation["title"]),
        f"<style>\n{style}</style>",
    ]


def _headline(evaluation: Evaluation) -> Html:
    sentences = headline(evaluation)
    if not sentences:
        return Html("")
    return element("section", element("h2", "What was found"), *(element("p", s) for s in sentences), class_="headline", id="headline")


def _points(evaluation: Evaluation) -> Html:
    objectives, judges = evaluation["objectives"], evaluation.get("judges") or []
    head = ["method", " / ".join(objectives), *objectives, *objectives, *judges]
    head += ["words", "refusals", "cut off", "KL, nats", "floor, nats", "cost", "tokens/s", "n", "unscored", "source"]
    groups = [("", 1), ("weights", 1), ("rewards, sd", len(objectives)), ("gain over the reference, sd", len(objectives))]
    groups += [("unseen judges", len(judges))] * bool(judges)
    groups += [("responses", 3), ("price", 4), ("origin", 3)]
    points = evaluation.get("points") or []
    rows = [_point_row(p, name, len(objectives), len(judges)) for p, name in zip(points, point_names(points), strict=True)]
    found = table(head, rows, groups, "Table of points")
    if not found:
        return found
    return join(
        note(
            "Means with 95 % intervals over prompts. Rewards are in standard deviations of the reference's reward, 0 being its mean; the "
            "gain is the difference to the reference on the same prompts. The floor is the KL of keeping only the likeliest tokens, which "
            "every method pays; it isn't part of the KL beside it. Cost 1 is one plain response, in "
            "tokens read; the reference beside a tuned policy only measures it and isn't counted. – is unscored, not 0."
            + (
                " A method's name, or its marker in a figure above, opens the responses behind the point."
                if any("index" in p for p in points)
                else ""
            )
        ),
        found,
    )


def _point_row(point: Point, name: str, objectives: int, judges: int) -> list[object]:
    candidates = point.get("n_candidates") or 1
    ambiguous = name == point["label"] != point["method"]
    shown = " ".join(part for part in (name, weights_text(point.get("weights")) if ambiguous else "") if part)
    return [
        join(
            opener(point, shown) if "index" in point else point["method"],
            f", n\u00a0=\u00a0{candidates}" if candidates > 1 else "",
            element("small", name) if ambiguous else "",
        ),
        weights_text(point.get("weights")),
        *(interval(entry(point.get("reward"), k)) for k in range(objectives)),
        *(interval(entry(point.get("gain"), k), sign=True) for k in range(objectives)),
        *(interval(entry(point.get("judge"), k)) for k in range(judges)),
        decimal(point.get("words"), 0),
        percent(point.get("refusals"), 1),
        percent(point.get("truncated"), 1),
        decimal(point.get("kl")),
        decimal(point.get("kl_floor")),
        multiple(point.get("cost")),
        decimal(point.get("tokens_per_s"), 0),
        decimal(point.get("n"), 0),
        decimal(point.get("n_unscored"), 0),
        element("code", point.get("source")),
    ]


def _equal(evaluation: Evaluation) -> Html:
    parts = []
    for key, title, what in (("equal_kl", "Equal KL", "KL, nats"), ("equal_compute", "Equal compute", "cost")):
        rows = [
            (
                r["objective"],
                f"{r['ours']} − {r['other']}",
                price_of(r, *(("kl", "") if key == "equal_kl" else ("cost", "×"))),
                interval(r.get("difference"), sign=True),
                pvalue(r.get("p")),
                verdict(r),
            )
            for r in evaluation.get(key) or []
        ]
        if rows:
            head = ["objective", "difference between", what, "difference, sd [95 %]", "p", "ahead"]
            parts.append(join(element("h3", title), table(head, rows, name=title)))
    if not parts:
        return Html("")
    return join(
        note(
            "Differences on the same prompts; p from a two-sided paired permutation test. Nobody is called ahead where the interval "
            "holds 0. Neither is corrected for the number of comparisons. Between two n, best-of-n is the mixture of both that has the "
            "method's price. A method that spends more than the largest n is brought to that one's price by answering with the reference "
            "now and then (mixed); it may do better if it is made for that price."
        ),
        *parts,
    )


def _gain(evaluation: Evaluation) -> Html:
    drawn = []
    for draw, caption in (
        (gain_per_nat_figure, "Gain against KL. A curve above another buys more reward for the same departure from the reference."),
        (gain_per_compute_figure, "Gain against cost. A curve above another buys more reward for the same compute."),
    ):
        drawn += [(draw(evaluation, [name]), caption) for name in evaluation["objectives"]]
    return figures(*drawn)


def _distributions(evaluation: Evaluation) -> Html:
    caption = (
        "With all weight on the objective: half of the responses lie in the bar, 90 % on the line, the median is the thick mark; "
        "dashed is the reference's."
    )
    return figures(*((distribution_figure(evaluation, k), caption) for k in range(len(evaluation["objectives"]))))


def _profile(evaluation: Evaluation) -> Html:
    caption = "Gains over the reference at equal weights, in standard deviations. The dashed ring is no gain; within it something was lost."
    return figures((radar_figure(evaluation), caption))


def _gaming(evaluation: Evaluation) -> Html:
    drawn = bars_figure(evaluation)
    if not drawn:
        return Html("")
    parts = (slips_table(evaluation), equal_length_table(evaluation))
    warning = "These rewards can be gamed: look here. A gain that comes with longer answers or more refusals may be no more than that."
    return join(element("p", warning), figures((drawn, "Mean rewards, words per response and share of refusals of each point.")), *parts)


def _examples(evaluation: Evaluation) -> Html:
    examples = evaluation.get("examples") or []
    parts = []
    for index, example in enumerate(examples[:_EXAMPLES], 1):
        cards = [_response(r, evaluation["objectives"]) for r in example.get("responses") or []]
        parts.append(element("h3", f"Prompt {index}"))
        parts.append(element("div", example["prompt"], class_="prompt", dir="auto"))
        parts.append(element("div", *cards, class_="responses", tabindex="0", role="region", aria_label=f"Responses to prompt {index}"))
    if len(examples) > _EXAMPLES:
        parts.append(note(f"{len(examples) - _EXAMPLES} more in the data."))
    return join(*parts)


def _response(response: Point, objectives: Sequence[str]) -> Html:
    reward = response.get("reward") or []
    scores = [f"{name} {decimal(reward[k] if k < len(reward) else None, sign=True)}" for k, name in enumerate(objectives)]
    words = element("p", response["text"], dir="auto") if response.get("text") else element("p", "(empty response)", class_="soft")
    parts = [element("h4", response["label"]), element("div", " · ".join(scores), class_="scores"), words]
    return element("article", *parts, class_="response")


def _values(evaluation: Evaluation) -> Html:
    values = evaluation.get("values") or []
    positions = sorted({position for row in values for position, _ in row.get("r2_by_position") or []})
    rows = []
    for row in values:
        by_position = dict(row.get("r2_by_position") or [])
        rows.append([f"{row['form']}, {row['objective']}", decimal(row.get("r2")), *(decimal(by_position.get(p)) for p in positions)])
    groups = [("", 1), ("", 1), ("at position (tokens of the response)", len(positions))] if positions else []
    found = table(["head", "R², all", *(f"{p:g}" for p in positions)], rows, groups, "R² of the value heads")
    explained = (
        "R² on held-out prompts; 0 is no better than the mean. The teacher's is of the final reward, the single-pass form's of "
        "the teacher's advantage of each drawn token, the prefix form's of the teacher's value."
    )
    return join(note(explained), found) if found else found


def _calibration(evaluation: Evaluation) -> Html:
    rows = []
    for row in evaluation.get("calibration") or []:
        asked, realised = number(row.get("asked")), number(row.get("realised"))
        ratio = realised / asked if asked and realised is not None else None
        rows.append((weights_text(row.get("weights")), decimal(asked), decimal(realised), decimal(ratio)))
    return table(["weights", "asked, nats", "realised, nats", "realised / asked"], rows, name="KL asked for and realised")


def _how(evaluation: Evaluation) -> Html:
    parts = []
    for key, title in (("sampling", "Sampling"), ("settings", "Settings"), ("versions", "Versions")):
        rows = flatten(evaluation.get(key) or {})
        if rows:
            parts += [element("h3", title), table(["name", "value"], rows, name=title)]
    return element("div", *parts, class_="prose") if parts else Html("")


def _files(evaluation: Evaluation) -> Html:
    rows = [(element("code", f["path"]), f.get("what"), element("code", f.get("sha256"))) for f in evaluation.get("files") or []]
    found = table(["file", "what", "SHA-256"], rows, name="Files")
    many = folded(f"{len(rows)} files", found) if len(rows) > _FILES else found
    return element("div", note("Every number above is computed from these files."), many, class_="prose") if found else found
