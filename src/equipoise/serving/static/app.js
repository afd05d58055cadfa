// The page: what is asked, of whom, and where the answers go.

import { ServerError, about as askAbout, hasKey, stream, useKey } from "./api.js";
import { answerView } from "./answer.js";
import { conversation } from "./conversation.js";
import { el } from "./dom.js";
import { measured } from "./measured.js";
import { sidePanel } from "./side.js";
import { asCurl, asPython } from "./snippets.js";
import { even, moved as weighted } from "./weights.js";

const PAUSE = 600; // ms without a move after which a live answer is asked for
const HUES = 6;
const EXAMPLES = ["How do I make bread?", "My neighbour's dog barks all night. What can I do?", "Tell me how locks are picked."];
const $ = (id) => document.getElementById(id);
const news = (text) => { $("news").textContent = text; };

let running = null; // the AbortController of the answers that are being written
let timer = 0, saying = 0;

/** What the server says of itself; the key is asked for as long as it wants one. */
async function known() {
  for (;;) {
    try {
      return await askAbout();
    } catch (error) {
      if (error.status !== 401 || !await newKey(error.message)) throw error;
    }
  }
}

/** Ask for a key; whether there is one now. */
function newKey(message) {
  const [dialog, field] = [$("key"), $("key-field")];
  $("key-why").textContent = message;
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    if (field.value) useKey(field.value);
    resolve(field.value !== "");
  }, { once: true }));
}

function begin(about) {
  const objectives = [...new Set([...about.objectives, ...about.methods.flatMap((offer) => offer.objectives)])];
  const hue = (name) => Math.max(0, objectives.indexOf(name)) % HUES;
  const figure = measured(about);
  const talk = conversation($("talk"));
  const first = about.methods.find((offer) => offer.reads.includes("weights")) ?? about.methods[0];
  // A weighs all objectives alike, B leans to the last one: there is something to compare.
  const beginnings = { A: even, B: (count) => weighted(even(count), count - 1, 85) };
  const panels = Object.entries(beginnings).map(([name, begun]) =>
    sidePanel(about, { name, first, begun, hue, changed: () => { moved(); later(); }, code: (kind) => copy(kind, name) }));
  const sides = () => ($("compare").checked ? panels : panels.slice(0, 1));
  const length = $("length");
  length.max = about.limits.max_tokens;
  length.value = Math.min(about.limits.max_tokens, 96);
  $("model").textContent = about.model;
  $("sides").append(...panels.map((panel) => panel.root));
  const draft = (text) => { $("message").value = text; $("message").focus(); };
  $("examples").append(...EXAMPLES.map((text) => el("button", { type: "button", class: "quiet", on: { click: () => draft(text) } }, text)));

  function show() {
    const shown = sides().map((side) => side.name);
    const answers = talk.answers().filter(({ answer }) => shown.includes(answer.side));
    figure.show(sides(), answers.map(({ answer, turn }) => ({ answer, old: turn !== talk.last })));
    const pushing = sides().filter(({ offer }) => offer.explains).flatMap(({ offer }) => offer.objectives);
    const told = new Set([...pushing, ...answers.flatMap(({ answer }) => Object.keys(answer.push[0]?.nats ?? {}))]);
    $("legend").replaceChildren(...objectives.filter((name) => told.has(name)).map((name) =>
      el("span", { class: `word for o${hue(name)}`, style: "--deep:35%" }, name)));
    if (!told.size) $("legend").textContent = "This method doesn't say what pushed its words.";
    $("welcome").hidden = talk.turns.length > 0;
    for (const id of ["again", "over"]) $(id).disabled = !talk.last;
    $("send").hidden = running !== null;
    $("stop").hidden = running === null;
  }

  function moved() {
    show();
    clearTimeout(timer);
    if ($("live").checked && talk.last) timer = setTimeout(() => ask(talk.last, sides()), PAUSE);
  }

  /** Say what is measured of the new settings, once they rest. */
  function later() {
    clearTimeout(saying);
    saying = setTimeout(() => news($("readout").textContent), PAUSE);
  }

  function bodyOf(side, messages) {
    const most = Math.min(about.limits.max_tokens, Math.max(1, Math.round(length.valueAsNumber) || 1));
    const seed = $("seed").valueAsNumber;
    return { ...side.fields, messages, max_tokens: most, ...(Number.isInteger(seed) && { seed }) };
  }

  /** Have the sides answer a turn, in place of what they said before. */
  async function ask(turn, asked) {
    halt();
    const own = running = new AbortController();
    const views = asked.map((side) => answerView(side.name, side.words, hue, about.scaled ? "sd" : ""));
    const bodies = asked.map((side) => bodyOf(side, talk.history(turn, side.name)));
    talk.put(turn, Object.fromEntries(views.map((view) => [view.side, view])));
    views.forEach((view) => view.colour($("push").checked));
    show();
    turn.root.scrollIntoView({ block: "nearest" });
    await Promise.all(views.map((view, i) => write(view, asked[i], bodies[i], own)));
    if (running === own) running = null;
    show();
    news(views.map((view) => view.summary).filter(Boolean).join(" "));
  }

  async function write(view, side, body, own) {
    side.problem("");
    try {
      await stream(body, (choice) => { view.gain(choice); if (choice.finish_reason) show(); }, own.signal);
    } catch (error) {
      if (error.name === "AbortError") return view.halt();
      view.fail(error.message);
      if (!(error instanceof ServerError)) throw error;
      view.summary = `Answer ${side.name} failed: ${error.message}`;
      if (error.status === 400 && "targets" in body) side.problem(error.message);
      if (error.status === 401) await newKey(error.message);
    }
  }

  function halt() {
    clearTimeout(timer);
    running?.abort();
    running = null;
  }

  async function copy(kind, name) {
    const side = panels.find((panel) => panel.name === name);
    const draft = $("message").value.trim();
    const messages = draft ? [...talk.history(null, name), { role: "user", content: draft }] : talk.history(talk.last, name);
    const body = bodyOf(side, messages.length ? messages : [{ role: "user", content: EXAMPLES[0] }]);
    const text = (kind === "curl" ? asCurl : asPython)(body, new URL("v1", document.baseURI).href, hasKey());
    $("code-text").textContent = text;
    $("code-name").textContent = `Answer ${name} as ${kind}`;
    try {
      await navigator.clipboard.writeText(text);
      $("code-done").textContent = "It is on the clipboard.";
    } catch {
      $("code-done").textContent = "The clipboard can't be reached from here: select the text and copy it.";
    }
    $("code").showModal();
  }

  function send() {
    const text = $("message").value.trim();
    if (!text) { $("message").focus(); return; }
    $("message").value = "";
    ask(talk.add(text), sides());
  }

  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("again").addEventListener("click", () => ask(talk.last, sides()));
  $("stop").addEventListener("click", () => { halt(); show(); $("message").focus(); news("Stopped."); });
  $("over").addEventListener("click", () => { halt(); talk.clear(); show(); $("message").focus(); });
  $("new-seed").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); moved(); });
  for (const id of ["seed", "length"]) $(id).addEventListener("change", moved);
  $("push").addEventListener("change", () => {
    $("legend-row").hidden = !$("push").checked;
    talk.answers().forEach(({ answer }) => answer.colour($("push").checked));
  });
  $("compare").addEventListener("change", () => {
    const on = $("compare").checked;
    document.body.classList.toggle("comparing", on);
    panels[1].root.hidden = !on;
    if (on && talk.last && !running && !talk.last.answers.B) ask(talk.last, panels.slice(1));
    if (!on) {
      halt();
      talk.turns.forEach((turn) => talk.drop(turn, "B"));
    }
    show();
  });
  panels[1].root.hidden = true;
  show();
  $("page").hidden = false;
}

known().then(begin).catch((error) => {
  $("failed").textContent = error.message;
  $("failed").hidden = false;
});
