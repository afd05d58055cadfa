"""The responses behind each point of a comparison, carried by the report page and opened there by a click, without any network.

The page holds them once, as JSON that no markup can end; its script puts texts in by `textContent` only. Without script the
page shows everything but these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.drawing import Evaluation, Point
from equipoise.evaluation.markup import Html, element, embedded_json, join, printable
from equipoise.evaluation.sweep import Scored
from equipoise.types import Prompt

Responses = Mapping[str, Any]
"""`names` of the scorers, `prompts` (texts), and `sources`: of each point's source the rows [prompt, text, scores]."""

SCRIPT = """
const dialog = document.getElementById("responses");
if (dialog) {
  const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
  let responses = null, points = null;
  const add = (parent, tag, text, name) => {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = name;
    parent.append(made);
    return made;
  };
  const open = (index, title) => {
    responses ??= parsed("responses-data");
    points ??= parsed("evaluation").points;
    const point = points[index], rows = responses.sources[point.source] ?? [];
    const shown = point.chosen ? point.chosen.map((row) => rows[row]) : rows;
    const list = document.getElementById("responses-list");
    document.getElementById("responses-title").textContent = title;
    list.replaceChildren();
    let last = null;
    for (const [prompt, text, scores] of [...shown].sort((a, b) => a[0] - b[0])) {
      if (prompt !== last) add(list, "div", responses.prompts[prompt], "prompt").dir = "auto";
      last = prompt;
      const card = add(list, "article", "", "response");
      const written = (score) => score === null ? "\\u2013" : score.toFixed(2).replace("-", "\\u2212");
      const said = scores.map((score, k) => responses.names[k] + " " + written(score));
      add(card, "div", said.join(" \\u00b7 "), "scores");
      add(card, "p", text || "(empty response)", text ? "" : "soft").dir = "auto";
    }
    dialog.showModal();
    dialog.scrollTop = 0;
  };
  const buttons = [...document.querySelectorAll("button.point")];
  for (const button of buttons) {
    button.disabled = false;
    button.addEventListener("click", () => open(Number(button.dataset.point), button.dataset.title));
  }
  for (const drawn of document.querySelectorAll("figure svg")) {
    const marks = [...drawn.querySelectorAll("[data-point]")];
    const near = (event) => {
      let best = null, least = 20;
      for (const mark of marks) {
        const box = mark.getBoundingClientRect();
        const away = Math.hypot(event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2);
        if (away < least) [best, least] = [mark, away];
      }
      return best;
    };
    if (!marks.length) continue;
    drawn.addEventListener("pointermove", (event) => { drawn.style.cursor = near(event) ? "pointer" : ""; });
    drawn.addEventListener("click", (event) => {
      const index = near(event)?.dataset.point;
      if (index) open(Number(index), buttons.find((button) => button.dataset.point === index).dataset.title);
    });
  }
  document.getElementById("responses-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
"""


def responses_of(points: Sequence[Scored], prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """What `render_report` takes beside an evaluation: every response of the sampled points with its scores, as they were given."""
    ids = list(dict.fromkeys(r.prompt_id for point in points for r in point.rollouts))
    place = {prompt: index for index, prompt in enumerate(ids)}
    sources = {}
    for point in points:
        scores = [[round(float(v), 2) if math.isfinite(v) else None for v in row] for row in point.reward_NK]
        rows = zip(point.rollouts, scores, strict=True)
        sources[point.source] = [[place[rollout.prompt_id], printable(rollout.text), found] for rollout, found in rows]
    names = [printable(name) for name in (points[0].names if points else ())]
    return {"names": names, "prompts": [printable(prompts[i].text) for i in ids], "sources": sources}


def opener(point: Point, title: str) -> Html:
    """The method's name as a button that opens the point's responses; it does nothing until the script has woken it."""
    data = {"data-point": str(point["index"]), "data-title": title}
    return element("button", point["method"], type="button", class_="point", title="Show its responses", disabled="", **data)


def marked(evaluation: Evaluation, responses: Responses) -> dict[str, Any]:
    """The evaluation, every point whose responses are there with its `index`."""
    points = enumerate(evaluation.get("points") or [])
    found = [{**p, "index": i} if p.get("source") in responses["sources"] else p for i, p in points]
    return {**evaluation, "points": found}


def dialog(responses: Responses) -> Html:
    """The box that a click fills, closed and empty, and the responses as data."""
    return join(
        element(
            "dialog",
            element("button", "Close", type="button", id="responses-close"),
            element("h2", "", id="responses-title"),
            element("p", "Scores as they were given, larger is better.", class_="soft"),
            element("div", id="responses-list"),
            id="responses",
            aria_labelledby="responses-title",
        ),
        Html(f'<script id="responses-data" type="application/json">{embedded_json(responses)}</script>'),
    )
