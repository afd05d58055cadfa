// One side's settings: method, weights or targets, strength, and the request as code.

import { el, spoken } from "./dom.js";
import { weightPicker } from "./picker.js";
import { named } from "./weights.js";

const KL = { least: 0.1, most: 6, step: 0.1 };

/** An example of targets for these objectives. */
const example = (names) => names.map((name, k) => `${name}>=${k ? "keep" : "+0.2sd"}`).join(" ");

/**
 * The settings of side `name`: {root, name, offer, weights, budget, fields, words, problem}. `begun` makes the weights of a number of
 * objectives to begin with, `hue` gives an objective's number; `changed` is called for every move, `code` with the kind of code
 * that is wanted.
 */
export function sidePanel(about, { name, first, begun, hue, changed, code }) {
  const offers = Object.fromEntries(about.methods.map((offer) => [offer.method, offer]));
  const kept = {}; // units by objectives, so that they outlive a change of method
  const strengths = {}; // by method
  let offer = first, asks = "";
  const id = (what) => `${what}-${name}`;
  const body = el("div");
  const problem = el("p", { class: "problem", role: "alert", id: id("problem") });
  const method = el("select", { id: id("method"), on: { change: () => { offer = offers[method.value]; build(); changed(); } } },
    ...about.methods.map((one) => el("option", { value: one.method, selected: one === first }, one.method)));
  const root = el("fieldset", { class: "side" }, el("legend", {}, `Answer ${name}`),
    el("div", { class: "row" }, el("label", { for: id("method") }, "Method"), method), body,
    el("div", { class: "row end" }, ...["curl", "Python"].map((kind) =>
      el("button", { type: "button", class: "quiet", on: { click: () => code(kind) } }, `Copy ${name} as ${kind}`))));

  const reads = (field) => offer.reads.includes(field);
  const units = () => (kept[offer.objectives.join()] ??= begun(offer.objectives.length));

  function build() {
    say("");
    const parts = [el("p", { class: "about" }, offer.about)];
    if (reads("weights")) parts.push(weighing());
    if (offer.weights) parts.push(el("p", { class: "about" }, `trained at ${spoken(offer.weights)}`));
    if (reads("targets")) parts.push(targeting());
    if (reads("kl_budget") || reads("beta")) parts.push(going());
    body.replaceChildren(...parts);
  }

  function weighing() {
    const key = offer.objectives.join();
    const picker = weightPicker(offer.objectives, name, hue, (now) => { kept[key] = now; picker.show(now); changed(); });
    picker.show(units());
    return picker.root;
  }

  function targeting() {
    asks ||= example(offer.objectives);
    const field = el("input", {
      id: id("targets"), type: "text", value: asks, spellcheck: "false", autocapitalize: "off", autocomplete: "off",
      "aria-describedby": `${id("targets-help")} ${problem.id}`, on: { input: () => { asks = field.value; say(""); changed(); } },
    });
    const [one, other = one] = offer.objectives;
    const help = el("p", { class: "about", id: id("targets-help") }, "For example ", el("code", {}, `${one}>=+0.2sd ${other}>=keep`),
      ": keep is the mean of the model as it is, q70 its 70 % quantile, +0.2sd a fifth of a standard deviation above the mean.");
    return el("div", { class: "targets" }, el("label", { for: field.id }, `Targets of ${name}`), field, problem, help);
  }

  function going() {
    const ways = [["kl_budget", "KL, nats"], ["beta", "beta"]].filter(([field]) => reads(field));
    const by = Object.keys(offer.strength ?? {}).find(reads) ?? ways[0][0];
    const strength = (strengths[offer.method] ??= { kl_budget: 1, beta: 1, ...offer.strength, by });
    const budget = strength.by === "kl_budget";
    const number = el("input", {
      id: id("strength"), type: "number", min: 0.01, step: "any", value: strength[strength.by], on: { input: () => take(number) },
    });
    const range = el("input", {
      type: "range", min: KL.least, max: KL.most, step: KL.step, value: strength.kl_budget,
      "aria-label": `KL budget of ${name}, nats per response`,
      on: { input: () => take(range) },
    });
    const take = (from) => {
      if (!(from.valueAsNumber > 0)) return;
      strength[strength.by] = from.valueAsNumber;
      (from === number ? range : number).value = from.valueAsNumber;
      changed();
    };
    const change = () => { strength.by = choice.value; build(); changed(); };
    const choice = el("select", { "aria-label": `Strength of ${name} is given as`, on: { change } },
      ...ways.map(([field, label]) => el("option", { value: field, selected: field === strength.by }, label)));
    const label = el("label", { for: number.id }, "Strength", el("span", { class: "unseen" }, ` of ${name}`));
    const row = el("div", { class: "row" }, label, ways.length > 1 ? choice : el("span", { class: "soft" }, ways[0][1]), number);
    return el("div", {}, row, budget ? range : el("p", { class: "about" }, "A smaller beta steers more."));
  }

  function say(text) {
    problem.textContent = text;
    document.getElementById(id("targets"))?.setAttribute("aria-invalid", text ? "true" : "false");
  }

  const side = {
    root,
    name,
    get offer() { return offer; },
    /** By objective; null where the method reads none. */
    get weights() { return reads("weights") ? named(offer.objectives, units()) : null; },
    /** Nats that are asked for; null where another strength is. */
    get budget() { return strengths[offer.method]?.by === "kl_budget" ? strengths[offer.method].kl_budget : null; },
    /** What a request carries of it. */
    get fields() {
      const strength = strengths[offer.method];
      return {
        model: `${about.model}:${offer.method}`,
        ...(reads("weights") && { weights: side.weights }),
        ...(reads("targets") && { targets: asks }),
        ...(strength && { [strength.by]: strength[strength.by] }),
        ...(offer.explains && { explain: true }),
      };
    },
    /** The settings in a line. */
    get words() {
      const { weights, targets, kl_budget: budget, beta } = side.fields;
      const nats = budget && `${budget} ${budget === 1 ? "nat" : "nats"}`;
      const parts = [offer.method, weights && spoken(weights), targets, nats, beta && `beta ${beta}`];
      return parts.filter(Boolean).join(" · ");
    },
    /** Show what the server says against the targets. */
    problem: say,
  };
  build();
  return side;
}
