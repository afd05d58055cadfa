// The figure: measured fronts of two objectives, the reference, the weights that are set now, and what answers scored.

import { el, plain, ranged, signed, spoken, svg } from "./dom.js";
import { title } from "./front.js";

const W = 360, H = 250, LEFT = 44, RIGHT = 12, TOP = 12, BOTTOM = 40;

/** Round steps for about `count` ticks between two numbers. */
export function ticks(lo, hi, count = 5) {
  const raw = (hi - lo) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(lo / step); k * step <= hi + 1e-9; k++) found.push(k * step);
  return found;
}

function scaleOf(values, from, to) {
  const lo = Math.min(0, ...values), hi = Math.max(0, ...values), pad = Math.max(0.1, (hi - lo) * 0.07);
  const scale = (value) => from + ((value - lo + pad) / (hi - lo + 2 * pad)) * (to - from);
  return Object.assign(scale, { lo: lo - pad, hi: hi + pad });
}

const shown = (front, point, names) => names.map((name) => point.reward[front.objectives.indexOf(name)]);
const ends = ([x, y]) => [[x.lo, y.lo], [x.hi, y.hi], [x.mean, y.mean]];

/**
 * Draw into the node. `names` are the two objectives; `fronts` all of them and `main` those that are drawn whole; `live` and `promised`
 * are [{side, x, y, text}] with intervals or numbers, `answers` [{side, x, y, old}].
 */
export function draw(node, { names, fronts, main, others, live, promised, answers }) {
  const known = fronts.filter((front) => names.every((name) => front.objectives.includes(name)));
  const seen = known.filter((front) => main.includes(front) || others || front.method === "reference");
  const measured = seen.flatMap((front) => front.points.map((point) => shown(front, point, names)));
  const intervals = [...measured, ...live.map(({ x, y }) => [x, y])];
  const places = [...intervals.flatMap(ends), ...answers.map(({ x, y }) => [x, y]), ...promised.map(({ x, y }) => [x, y])];
  const real = places.filter((place) => place.every(Number.isFinite));
  const X = scaleOf(real.map(([x]) => x), LEFT, W - RIGHT), Y = scaleOf(real.map(([, y]) => y), H - BOTTOM, TOP);

  const cross = ([x, y], name) => svg("path", { class: name, d: `M${X(x.lo)} ${Y(y.mean)}H${X(x.hi)}M${X(x.mean)} ${Y(y.lo)}V${Y(y.hi)}` });
  const draws = (front) => {
    const whole = main.includes(front);
    const points = front.points.map((point) => ({ weights: point.weights, at: shown(front, point, names) }))
      .filter(({ at }) => ends(at).flat().every(Number.isFinite));
    // Of two objectives the weights have an order, and a line can follow it.
    const ordered = front.objectives.length === 2 && points.every(({ weights }) => weights) ? [...points] : [];
    ordered.sort((a, b) => a.weights[0] - b.weights[0]);
    const line = ordered.map(({ at: [x, y] }, i) => `${i ? "L" : "M"}${X(x.mean)} ${Y(y.mean)}`).join("");
    return svg("g", { class: whole ? "front main" : "front" },
      svg("title", {}, title(front)),
      line && svg("path", { class: "line", d: line }),
      ...points.map(({ at }) => cross(at, "cross")),
      ...points.map(({ at: [x, y] }) => front.method === "reference"
        ? svg("path", { class: "reference", d: `M${X(x.mean) - 5} ${Y(y.mean) - 5}l10 10m0-10l-10 10` })
        : svg("circle", { class: "dot", cx: X(x.mean), cy: Y(y.mean), r: whole ? 3 : 2 })));
  };
  const [one, two] = live;
  const close = two && Math.hypot(X(one.x.mean) - X(two.x.mean), Y(one.y.mean) - Y(two.y.mean)) < 16;
  const mark = (side, x, y, name, text, apart = 0) => {
    const [left, top] = [X(x) + (side === "A" ? -apart : apart), Y(y)];
    return svg("g", { class: `mark ${name} ${side}`, "data-x": x, "data-y": y }, svg("title", {}, text),
      side === "A" ? svg("circle", { cx: left, cy: top, r: 8 }) : svg("rect", { x: left - 7.5, y: top - 7.5, width: 15, height: 15 }),
      svg("text", { x: left, y: top + 3.8, "text-anchor": "middle" }, side));
  };
  const tick = (value, line, text) => svg("g", { class: Math.abs(value) < 1e-9 ? "tick zero" : "tick" },
    svg("line", line), svg("text", text, signed(value, 1)));
  const middle = { class: "name", "text-anchor": "middle" };

  const axis = [
    ...ticks(X.lo, X.hi).map((t) =>
      tick(t, { x1: X(t), x2: X(t), y1: TOP, y2: H - BOTTOM }, { x: X(t), y: H - BOTTOM + 14, "text-anchor": "middle" })),
    ...ticks(Y.lo, Y.hi).map((t) =>
      tick(t, { x1: LEFT, x2: W - RIGHT, y1: Y(t), y2: Y(t) }, { x: LEFT - 5, y: Y(t) + 3.5, "text-anchor": "end" })),
    svg("text", { ...middle, x: (LEFT + W - RIGHT) / 2, y: H - 6 }, `${names[0]}, sd →`),
    svg("text", { ...middle, x: -(TOP + H - BOTTOM) / 2, y: 11, transform: "rotate(-90)" }, `${names[1]}, sd →`),
  ];
  const told = [...live, ...answers.filter(({ old }) => !old), ...promised].map(({ text }) => text).join(" ");
  node.replaceChildren(svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${names[0]} and ${names[1]}. ${told}` },
    ...axis,
    ...seen.filter((front) => !main.includes(front)).map(draws), ...seen.filter((front) => main.includes(front)).map(draws),
    ...answers.filter(({ old }) => old).map(({ side, x, y, text }) => mark(side, x, y, "scored old", text)),
    ...live.map(({ x, y }) => cross([x, y], "cross now")),
    ...promised.map(({ x, y, text }) =>
      svg("path", { class: "promised", d: `M${X(x)} ${Y(y) - 9}l9 9l-9 9l-9 -9z` }, svg("title", {}, text))),
    ...live.map(({ side, x, y, text }) => mark(side, x.mean, y.mean, "live", text, close ? 8 : 0)),
    ...answers.filter(({ old }) => !old).map(({ side, x, y, text }) => mark(side, x, y, "scored", text)),
  ));
}

/** What is measured, as a table. */
export function table(fronts, names) {
  const known = fronts.filter((front) => names.every((name) => front.objectives.includes(name)));
  const rows = known.flatMap((front) => front.points.map((point) =>
    el("tr", {}, el("th", { scope: "row" }, title(front)),
      el("td", {}, point.weights ? spoken(Object.fromEntries(front.objectives.map((name, k) => [name, point.weights[k]]))) : "–"),
      ...shown(front, point, names).map((interval) => el("td", {}, ranged(interval))),
      el("td", {}, plain(point.kl)), el("td", {}, plain(point.cost, 1)), el("td", {}, String(point.n)))));
  const head = ["method", "weights", ...names, "KL, nats", "cost", "n"].map((name) => el("th", { scope: "col" }, name));
  const caption = "Means with 95 % intervals over prompts, in standard deviations above the reference's mean; cost in plain responses.";
  return el("table", {}, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}
