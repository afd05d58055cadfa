// The conversation: turns, each with the answers of one or two sides, and what of it a request carries.

import { el } from "./dom.js";

/** An empty conversation in `root`: {turns, last, add, put, clear, history, answers}. */
export function conversation(root) {
  const turns = [];
  return {
    turns,
    get last() { return turns.at(-1) ?? null; },
    /** A new turn of the user. */
    add(text) {
      const slots = el("div", { class: "answers" });
      const said = el("p", { class: "user", dir: "auto" }, text);
      const whole = el("section", { class: "turn", "aria-label": `Turn ${turns.length + 1}` }, said, slots);
      const turn = { text, answers: {}, slots, root: whole };
      turns.push(turn);
      root.append(whole);
      return turn;
    },
    /** Give a turn its answers, in the order of the sides. */
    put(turn, answers) {
      Object.assign(turn.answers, answers);
      turn.slots.replaceChildren(...Object.keys(turn.answers).sort().map((side) => turn.answers[side].root));
    },
    /** Forget an answer of a turn. */
    drop(turn, side) {
      turn.answers[side]?.root.remove();
      delete turn.answers[side];
    },
    /** Forget all. */
    clear() {
      turns.length = 0;
      root.replaceChildren();
    },
    /** Messages up to a turn as a side sees them: its own answers, the other's where it had none; turns without an answer are left out. */
    history(turn, side) {
      const messages = [];
      for (const one of turns) {
        if (one === turn) break;
        const answer = one.answers[side]?.text ? one.answers[side] : Object.values(one.answers).find((other) => other.text);
        if (answer) messages.push({ role: "user", content: one.text }, { role: "assistant", content: answer.text });
      }
      return [...messages, ...(turn ? [{ role: "user", content: turn.text }] : [])];
    },
    /** All answers, the oldest first. */
    answers: () => turns.flatMap((turn) => Object.values(turn.answers).map((answer) => ({ answer, turn }))),
  };
}
