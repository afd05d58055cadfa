// What the runs measured, on the page: the figure, the point of the weights that are set now, and the numbers beside it.

import { promised } from "./answer.js";
import { el, plain, ranged, signed, spoken } from "./dom.js";
import { draw, table } from "./figure.js";
import { along, frontOf, title } from "./front.js";

const $ = (id) => document.getElementById(id);

/** Fill the figure's part of the page: {show(sides, answers)}, of the sides' settings and [{answer, old}]. */
export function measured(about) {
  const names = [...new Set([...about.fronts.flatMap((front) => front.objectives), ...about.objectives])];
  if (names.length < 2) { $("measured").hidden = true; return { show() {} }; }
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
  which.append(el("option", { value: "" }, "that of the method"), ...choices.map((front, i) => el("option", { value: i }, title(front))));
  $("others").closest("label").hidden = which.closest("label").hidden = !choices.length;
  for (const control of [x, y, which, $("others")]) {
    control.addEventListener("change", () => {
      if (x.value === y.value) (control === x ? y : x).value = names.find((name) => name !== control.value);
      again();
    });
  }

  /** [the front of a side, the sentence about its weights, where they lie on it]. */
  function placed(side) {
    if (!side.offer.reads.length && !side.offer.weights) {
      const front = fronts.find((one) => one.method === "reference");
      const [point] = front?.points ?? [];
      const reward = point && Object.fromEntries(front.objectives.map((name, k) => [name, point.reward[k]]));
      return [front, point ? `measured as ${list(reward)}.` : "not measured.", reward && { reward }];
    }
    const weights = side.weights ?? side.offer.weights;
    if (!weights) return [null, "its answers say what is promised.", null];
    const front = which.value ? choices[Number(which.value)] : frontOf(side.offer, choices);
    if (!front) return [null, `no front of ${side.offer.method} was measured${choices.length ? "; choose one above to compare with" : ""}.`, null];
    const found = along(front, weights);
    if (!found) return [front, `${title(front)} has other objectives.`, null];
    return [front, `${list(found.reward)}, at ${plain(found.kl)} nats: ${origin(front, found)}${apart(side, found)}`, found];
  }

  const list = (reward) => Object.entries(reward).map(([name, interval]) => `${name} ${ranged(interval)}`).join(", ");
  const origin = (front, { how, between }) => {
    const at = between.map((weights) => `(${weights.map((w) => plain(w)).join(", ")})`).join(" and ");
    const said = { measured: `measured at ${at}`, interpolated: `interpolated between ${at}`, nearest: `of the nearest weights measured, ${at}` };
    return `${said[how]} on ${title(front)}.`;
  };
  const apart = (side, { kl }) => side.budget && Math.abs(side.budget - kl) > 0.15 * kl ? ` You ask for ${plain(side.budget, 1)} nats: expect a point further ${side.budget > kl ? "out" : "in"}.` : "";

  function show(sides, answers) {
    last = [sides, answers];
    const axes = [x.value, y.value], found = sides.map((side) => [side, ...placed(side)]);
    const live = found.filter(([, , , at]) => at && axes.every((name) => at.reward[name])).map(([side, , text, at]) =>
      ({ side: side.name, x: at.reward[axes[0]], y: at.reward[axes[1]], text: `Live point ${side.name}${side.weights ? `, ${spoken(side.weights)}` : ""}: ${text}` }));
    const scored = answers.filter(({ answer }) => axes.every((name) => Number.isFinite(answer.facts?.scores?.[name]))).map(({ answer, old }) => {
      const [ax, ay] = axes.map((name) => answer.facts.scores[name]);
      return { side: answer.side, x: ax, y: ay, old, text: `Answer ${answer.side}: ${axes[0]} ${signed(ax)}, ${axes[1]} ${signed(ay)}.` };
    });
    const hopes = answers.filter(({ answer, old }) => !old && answer.facts?.answer?.levels).map(({ answer }) => [answer, Object.fromEntries(promised(answer.facts.answer))])
      .filter(([, z]) => axes.every((name) => name in z)).map(([answer, z]) =>
        ({ side: answer.side, x: z[axes[0]], y: z[axes[1]], text: `Promised to ${answer.side} on average: ${axes[0]} ${signed(z[axes[0]])}, ${axes[1]} ${signed(z[axes[1]])}.` }));
    const main = [...new Set(found.map(([, front]) => front).filter(Boolean))];
    draw($("figure"), { names: axes, fronts, main, others: $("others").checked, live, promised: hopes, answers: scored });
    $("readout").replaceChildren(...found.map(([side, , text]) => el("p", { "data-side": side.name }, el("b", {}, side.name), ` ${text}`)));
    $("table").replaceChildren(table(fronts, axes));
  }
  return { show };
}
