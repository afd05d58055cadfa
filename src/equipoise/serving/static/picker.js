// Controls of weights: a slider for two objectives, a triangle for three, a slider each for more.

import { el, plain, spoken, svg } from "./dom.js";
import { WHOLE, fromPlane, moved, named, toPlane } from "./weights.js";

const said = (names, units) => spoken(named(names, units));

/** Controls for the weights of `names`: {root, show(units)}; `hue` gives an objective's number, `set(units)` is called for every move. */
export function weightPicker(names, side, hue, set) {
  const picker = { 2: slider, 3: triangle }[names.length] ?? sliders;
  return picker(names, side, hue, set);
}

function slider(names, side, hue, set) {
  const numbers = names.map(() => el("output"));
  const range = el("input", {
    type: "range", min: 0, max: WHOLE, step: 1, "aria-label": `Weights of ${side}: ${names[0]} at the left, ${names[1]} at the right`,
    on: { input: () => set([WHOLE - range.valueAsNumber, range.valueAsNumber]) },
  });
  const ends = names.map((name, k) => el("span", { class: `end o${hue(name)}` }, el("b", {}, name), " ", numbers[k]));
  return {
    root: el("div", { class: "picker" }, el("div", { class: "ends" }, ...ends), range),
    show(units) {
      range.value = units[1];
      range.setAttribute("aria-valuetext", said(names, units));
      numbers.forEach((number, k) => { number.value = plain(units[k] / WHOLE); });
    },
  };
}

function sliders(names, side, hue, set) {
  let now = [];
  const rows = names.map((name, k) => {
    const number = el("output");
    const range = el("input", {
      type: "range", min: 0, max: WHOLE, step: 1, "aria-label": `Weight of ${side} on ${name}`,
      on: { input: () => set(moved(now, k, range.valueAsNumber)) },
    });
    return { number, range, row: el("div", { class: `share o${hue(name)}` }, el("b", {}, name), number, range) };
  });
  return {
    root: el("div", { class: "picker" }, ...rows.map(({ row }) => row)),
    show(units) {
      now = units;
      rows.forEach(({ number, range }, k) => { number.value = plain(units[k] / WHOLE); range.value = units[k]; });
    },
  };
}

// The triangle's drawing: weights' plane, one high, in this many units, with its left corner at (LEFT, FLOOR).
const HIGH = 130, LEFT = 25, FLOOR = 152, WIDE = (2 * HIGH) / Math.sqrt(3);
const onScreen = ([x, y]) => [LEFT + WIDE / 2 + HIGH * x, FLOOR - HIGH * y];

function triangle(names, side, hue, set) {
  let now = [];
  const corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]].map((corner) => onScreen(toPlane(corner)));
  const places = [["middle", 0, -8], ["start", -22, 17], ["end", 22, 17]]; // of the names: anchor, and how far from their corners
  const label = ([x, y], k) => svg("text", { "text-anchor": places[k][0], x: x + places[k][1], y: y + places[k][2] }, names[k]);
  const grid = [0.25, 0.5, 0.75].flatMap((w) => [0, 1, 2].map((k) => {
    const end = (other) => { const at = [0, 0, 0]; at[k] = w; at[other] = 1 - w; return onScreen(toPlane(at)); };
    const [a, b] = [end((k + 1) % 3), end((k + 2) % 3)];
    return svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: "grid" });
  }));
  const point = svg("circle", {
    r: 9, class: "thumb", tabindex: 0, role: "slider", "aria-valuemin": 0, "aria-valuemax": WHOLE,
    "aria-label": `Weights of ${side}: up is more ${names[0]}, left more ${names[1]}, right more ${names[2]}`,
  });
  const drawing = svg("svg", { viewBox: `0 0 ${2 * LEFT + WIDE} ${FLOOR + 24}`, class: "triangle" },
    svg("polygon", { points: corners.map((corner) => corner.join(",")).join(" ") }), ...grid, ...corners.map(label), point);
  const drag = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    set(fromPlane((at.x - LEFT - WIDE / 2) / HIGH, (FLOOR - at.y) / HIGH));
  };
  drawing.addEventListener("pointerdown", (event) => {
    drawing.setPointerCapture(event.pointerId);
    event.preventDefault();
    point.focus();
    drag(event);
  });
  drawing.addEventListener("pointermove", (event) => { if (drawing.hasPointerCapture(event.pointerId)) drag(event); });
  const KEYS = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [1, 1], ArrowRight: [2, 1], PageUp: [0, 10], PageDown: [0, -10] };
  point.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    const [k, step] = KEYS[event.key];
    event.preventDefault();
    set(moved(now, k, now[k] + step * (event.shiftKey ? 10 : 1)));
  });
  const numbers = names.map((name, k) => {
    const change = () => set(moved(now, k, input.valueAsNumber * WHOLE));
    const input = el("input", { type: "number", min: 0, max: 1, step: 0.01, on: { change } });
    const more = el("span", { class: "unseen" }, ` weight of ${side}`);
    return { input, root: el("label", { class: `o${hue(name)}` }, el("b", {}, name), more, input) };
  });
  return {
    root: el("div", { class: "picker" }, drawing, el("div", { class: "thirds" }, ...numbers.map(({ root }) => root))),
    show(units) {
      now = units;
      const [x, y] = onScreen(toPlane(units.map((u) => u / WHOLE)));
      point.setAttribute("cx", x);
      point.setAttribute("cy", y);
      point.setAttribute("aria-valuenow", units[0]);
      point.setAttribute("aria-valuetext", said(names, units));
      numbers.forEach(({ input }, k) => { input.value = (units[k] / WHOLE).toFixed(2); });
    },
  };
}
