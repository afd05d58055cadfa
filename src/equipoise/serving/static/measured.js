// What the runs measured, on the page: the figure, the point of the weights that are set now, and the numbers beside it.

import { promised } from "./answer.js";
import { el, plain, ranged, signed, spoken } from "./dom.js";
import { draw, table } from "./figure.js";
import { along, frontOf, title } from "./front.js";

const $ = (id) => document.getElementById(id);

/** Fill the figure's part of the page: {show(sides, answers)}, of the sides' settings and [{answer, old}]. */
export function measured(about) {
  const names = [...new Set([...about.fronts.flatMap((front) => front.objectives), ...about.objectives])];
  if (names.length < 2 || !(about.fronts.length || about.scaled)) { $("measured").hidden = true; return { show() {} }; }
  const fronts = about.fronts.filter((front) => front.objectives.length > 1);
  const choices = fronts.filter((front) => front.points.some((point) => point.weights));
  const [x, y, which] = [$("axis-x"), $("axis-y"), $("which")];
  let last = [[], []];
  const again = () => show(...last);
  names.forEach((name, k) => {
    x.append(el("option", { value: name, selected: k === 0 }, name));
    y.append(el("option", { value: name, selected: k === 1 }, name));
  });
  $("axes").hidden = names.length < 3;
  which.append(el("option", { value: "" }, "the method's"), ...choices.map((front, i) => el("option", { value: i }, title(front))));
  $("others").closest("label").hidden = which.closest("label").hidden = !choices.length;
  for (const control of [x, y, which, $("others")]) {
    control.addEventListener("change", () => {
      if (x.value === y.value) (control === x ? y : x).value = names.find((name) => name !== control.value);
      again();
    });
  }

  /** [the front of a side, the sentence about its weights, where they lie on it]. */
  function placed(side) {
    const weights = side.weights ?? side.offer.weights;
    if (!weights) {
      if (side.offer.reads.includes("targets")) return [null, "its answers say what is promised.", null];
      const own = fronts.find((one) => one.method === side.offer.method && !one.points[0]?.weights);
      const [point] = own?.points ?? [];
      if (!point) return [null, "not measured.", null];
      const reward = Object.fromEntries(own.objectives.map((name, k) => [name, point.reward[k]]));
      return [own, `${list(reward)}: measured.`, { reward }];
    }
    const front = which.value ? choices[Number(which.value)] : frontOf(side.offer, choices);
    const hint = choices.length ? "; choose one below to compare with" : "";
    if (!front) return [null, `no front of ${side.offer.method} was measured${hint}.`, null];
    const found = along(front, weights);
    if (!found) return [front, `${title(front)} has other objectives.`, null];
    return [front, `${list(found.reward)}, at ${plain(found.kl)} nats: ${origin(front, found)}${apart(side, found)}`, found];
  }

  const list = (reward) => Object.entries(reward).map(([name, interval]) => `${name} ${ranged(interval)}`).join(", ");
  const origin = (front, { how, between }) => {
    const at = between.map((weights) => `(${weights.map((w) => plain(w)).join(", ")})`).join(" and ");
    const said = { measured: "measured at", interpolated: "interpolated between", nearest: "of the nearest weights measured," };
    return `${said[how]} ${at} on ${title(front)}.`;
  };
  function apart(side, { kl }) {
    if (!side.budget || Math.abs(side.budget - kl) <= 0.15 * kl) return "";
    return ` You ask for ${plain(side.budget, 1)} nats: expect a point further ${side.budget > kl ? "out" : "in"}.`;
  }

  const lies = (side, text) => `Live point ${side.name}${side.weights ? `, ${spoken(side.weights)}` : ""}: ${text}`;

  function show(sides, answers) {
    last = [sides, answers];
    const axes = [x.value, y.value], found = sides.map((side) => [side, ...placed(side)]);
    const live = found.filter(([, , , at]) => at && axes.every((name) => at.reward[name])).map(([side, , text, at]) =>
      ({ side: side.name, x: at.reward[axes[0]], y: at.reward[axes[1]], text: lies(side, text) }));
    const placing = (answer, z, what) => {
      const [x, y] = axes.map((name) => z?.[name]);
      return { side: answer.side, x, y, text: `${what} ${answer.side}: ${axes[0]} ${signed(x)}, ${axes[1]} ${signed(y)}.` };
    };
    const known = ({ x, y }) => Number.isFinite(x) && Number.isFinite(y);
    const scored = answers.map(({ answer, old }) => ({ old, ...placing(answer, answer.facts?.scores, "Answer") })).filter(known);
    const hopes = answers.filter(({ answer, old }) => !old && answer.facts?.answer?.levels)
      .map(({ answer }) => placing(answer, Object.fromEntries(promised(answer.facts.answer)), "Promised on average to")).filter(known);
    const main = [...new Set(found.map(([, front]) => front).filter(Boolean))];
    draw($("figure"), { names: axes, fronts, main, others: $("others").checked, live, promised: hopes, answers: scored });
    $("readout").replaceChildren(...found.map(([side, , text]) => el("p", { "data-side": side.name }, el("b", {}, side.name), ` ${text}`)));
    $("table").replaceChildren(table(fronts, axes));
  }
  return { show };
}
