// What pushed each token: tokens beside the text that they make, and the objective that pushed most.

/** Nats below which a push isn't coloured, and at which the colour is full. */
export const FAINT = 0.05, FULL = 1.5;

/**
 * The text in pieces, each with the nats of its tokens: [{text, nats}, ...]; pieces join to the text. Tokens of half a character
 * are added up, and a token that is no part of the text, as the one that ends it, is a piece of its own without text.
 */
export function aligned(text, push) {
  const pieces = [];
  let at = 0, waiting = [];
  const take = (end, tokens, mark) => {
    const nats = {};
    for (const { nats: own } of tokens) for (const [name, value] of Object.entries(own)) nats[name] = (nats[name] ?? 0) + value;
    pieces.push({ text: text.slice(at, end), nats, tokens: tokens.length, ...(mark && { mark }) });
    at = end;
  };
  for (const token of push) {
    const core = token.token.trimStart();
    const skipped = text.slice(at).length - text.slice(at).trimStart().length;
    // A tokenizer may leave out the space before a word where it decodes the word alone.
    let found = -1, length = 0;
    if (token.token && text.startsWith(token.token, at)) [found, length] = [at, token.token.length];
    else if (core && text.startsWith(core, at + skipped)) [found, length] = [at, skipped + core.length];
    else if (core && waiting.length && !core.includes("\ufffd")) {
      found = text.indexOf(core, at);
      length = core.length;
      if (found > at + 8 * waiting.length) found = -1;
    }
    if (found < 0) { waiting.push(token); continue; }
    if (waiting.length) { take(found, waiting); waiting = []; }
    take(found + length, [token]);
  }
  if (at < text.length) take(text.length, waiting);
  else if (waiting.length) take(at, waiting, waiting.map((token) => token.token).join(""));
  return pieces;
}

/** [name, nats] of the objective whose push is largest, for or against; null where none reaches FAINT. */
export function strongest(nats) {
  const [name, value] = Object.entries(nats).reduce((a, b) => (Math.abs(b[1]) > Math.abs(a[1]) ? b : a), ["", 0]);
  return Math.abs(value) >= FAINT ? [name, value] : null;
}

/** All pushes of an answer together, by objective. */
export function total(push) {
  const sum = {};
  for (const { nats } of push) for (const [name, value] of Object.entries(nats)) sum[name] = (sum[name] ?? 0) + value;
  return sum;
}
