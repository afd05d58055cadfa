// One answer: its text as it comes, what pushed its words, and the numbers under it.

import { el, plain, signed, spoken } from "./dom.js";
import { FULL, aligned, strongest, total } from "./push.js";

const BAR = 3; // standard deviations from the middle of a score's bar to its end
const ENDS = { stop: "", length: "cut at the response length", stopped: "stopped" };

/** "helpful +0.31, harmless −0.05 nats" */
const pushed = (nats) => `${Object.entries(nats).map(([name, value]) => `${name} ${signed(value)}`).join(", ")} nats`;

/**
 * An empty answer of a side: {root, text, scores, facts, open, gain, end, fail, colour, summary}. `hue` gives an objective's number,
 * `words` says with what it was asked.
 */
export function answerView(side, words, hue, units) {
  const answer = { side, words, text: "", push: [], facts: null, said: null, open: true, failed: false };
  const prose = el("div", { class: "prose", dir: "auto" });
  const state = el("p", { class: "state" }, "waiting for the first word …");
  const numbers = el("div", { class: "numbers" });
  const scrub = el("div", { class: "scrub", hidden: true });
  const root = el("article", { class: `answer ${side}`, "aria-label": `Answer ${side}`, "aria-busy": "true" },
    el("header", {}, el("b", {}, side), " ", words), prose, state, scrub, numbers);
  let coloured = false, due = false, pieces = [], picked = -1;

  const range = el("input", {
    type: "range", min: 1, step: 1, "aria-label": `Word of answer ${side}, to read what pushed it`,
    on: { input: () => pick(range.valueAsNumber - 1) },
  });
  const reading = el("output");
  scrub.append(range, reading);

  function render() {
    due = false;
    state.hidden = !state.textContent;
    if (!coloured || !answer.push.length) {
      prose.replaceChildren(answer.text);
      scrub.hidden = true;
      return;
    }
    pieces = aligned(answer.text, answer.push);
    prose.replaceChildren(...pieces.flatMap(word));
    scrub.hidden = answer.open;
    range.max = pieces.length;
    if (!answer.open) pick(Math.min(Math.max(picked, 0), pieces.length - 1));
  }

  function word(piece, at) {
    const top = strongest(piece.nats);
    const part = piece.mark === undefined;
    const title = piece.tokens ? pushed(piece.nats) : null;
    const text = part ? piece.text : piece.mark || "(end)";
    const core = text.trimStart() || text; // the space before a word isn't coloured
    const span = el("span", { title, "data-at": at, class: part ? "word" : "word mark" }, core);
    if (top) {
      span.classList.add(`o${hue(top[0])}`, top[1] > 0 ? "for" : "against");
      span.style.setProperty("--deep", `${Math.round(12 + 33 * Math.min(1, Math.abs(top[1]) / FULL))}%`);
    }
    return [text.slice(0, text.length - core.length), span];
  }

  function pick(at) {
    prose.querySelector(".picked")?.classList.remove("picked");
    picked = at;
    if (!pieces[at]) return;
    prose.children[at].classList.add("picked");
    range.value = at + 1;
    const text = (pieces[at].mark ?? pieces[at].text).trim() || "space";
    const told = pieces[at].tokens ? pushed(pieces[at].nats) : "not told";
    range.setAttribute("aria-valuetext", `${text}: ${told}`);
    reading.replaceChildren(el("q", {}, text), ` ${told}`);
  }
  prose.addEventListener("click", (event) => { if (event.target.dataset.at && !answer.open) pick(Number(event.target.dataset.at)); });

  function soon() {
    if (due) return;
    due = true;
    requestAnimationFrame(render);
  }

  function close(text) {
    answer.open = false;
    root.setAttribute("aria-busy", "false");
    state.textContent = text;
    render();
  }

  function score(name, value, unit) {
    const share = Math.min(1, Math.abs(value) / BAR) * 50;
    const bar = el("span", { class: "bar", "aria-hidden": "true" }, Number.isFinite(value) &&
      el("span", { style: `width:${share}%;${value < 0 ? "right" : "left"}:50%` }));
    const number = el("span", { class: "value" }, `${signed(value)} ${unit}`);
    return el("li", { class: `o${hue(name)}` }, el("span", { class: "name" }, name), bar, number);
  }

  function tell(facts, reason) {
    const { scores, rewards } = facts, own = facts.answer ?? {};
    const shown = Object.entries(scores && Object.keys(scores).length ? scores : rewards ?? {});
    const unit = scores && Object.keys(scores).length ? "sd" : units;
    const rows = [
      ["KL", `${plain(facts.kl)} nats`, `and ${plain(facts.kl_floor)} for keeping the likeliest tokens alone`],
      ["tokens", String(facts.tokens)],
      own.beta && ["beta", plain(own.beta, 3)],
      own.multipliers && ["multipliers", spoken(own.multipliers)],
      own.candidates && ["candidates", String(own.candidates)],
      own.levels && ["promised on average", promised(own).map(([name, z]) => `${name} ${signed(z)} sd`).join(", ")],
      answer.push.length && ["pushes together", pushed(total(answer.push))],
      own.warnings?.length && ["note", own.warnings.join("; ")],
      ["cost", `${own.base_forwards ?? "–"} forwards, ${own.reward_calls ?? 0} reward calls`],
      ["seed", String(own.seed ?? facts.seed)],
    ].filter(Boolean);
    const list = shown.map(([name, value]) => score(name, value, unit));
    numbers.replaceChildren(el("ul", { class: "scores", "aria-label": `Scores of answer ${side}` }, ...list),
      el("dl", {}, ...rows.map(([name, value, more]) => el("div", {}, el("dt", {}, name), el("dd", { title: more }, value)))));
    answer.summary = `Answer ${side} is there: ${shown.map(([name, value]) => `${name} ${signed(value)} ${unit}`).join(", ")}, ` +
      `KL ${plain(facts.kl)} nats, ${facts.tokens} tokens${ENDS[reason] ? `, ${ENDS[reason]}` : ""}.`;
  }

  return Object.assign(answer, {
    root,
    summary: "",
    /** A choice of the stream. */
    gain({ delta, equipoise, finish_reason: reason }) {
      answer.text += delta?.content ?? "";
      if (reason) {
        answer.facts = equipoise;
        answer.push = equipoise.push ?? answer.push;
        tell(equipoise, reason);
        close(ENDS[reason] ?? reason);
        return;
      }
      answer.push.push(...(equipoise?.push ?? []));
      if (answer.text) state.textContent = "";
      soon();
    },
    /** It won't go on. */
    halt() {
      if (answer.open) close(answer.text ? ENDS.stopped : "stopped before the first word");
    },
    /** There is none. */
    fail(message) {
      answer.failed = true;
      state.classList.add("problem");
      close(message);
    },
    /** Show what pushed the words, or don't. */
    colour(wanted) {
      coloured = wanted;
      render();
    },
  });
}

/** [[objective, promised mean in sd above the reference's], ...] of a palette's answer. */
export const promised = ({ levels, base, sd }) =>
  Object.keys(levels).filter((name) => sd?.[name]).map((name) => [name, (levels[name] - base[name]) / sd[name]]);
