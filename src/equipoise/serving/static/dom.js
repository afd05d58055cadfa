// Elements in one line, and numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs)) {
    if (name === "on") for (const [event, told] of Object.entries(value)) node.addEventListener(event, told);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An HTML element; `on` holds its listeners, false, null and undefined leave an attribute away. */
export const el = (tag, attrs = {}, ...children) => fill(document.createElement(tag), attrs, children);

/** An SVG element. */
export const svg = (tag, attrs = {}, ...children) => fill(document.createElementNS(SVG, tag), attrs, children);

/** +0.42 or −0.42; a dash for what isn't known. */
export function signed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
}

/** A number without sign; a dash for what isn't known. */
export const plain = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");

/** +0.42 [+0.30, +0.54] */
export const ranged = ({ mean, lo, hi }) => `${signed(mean)} [${signed(lo)}, ${signed(hi)}]`;

/** "helpful 0.70, harmless 0.30" of {helpful: 0.7, harmless: 0.3} */
export const spoken = (weights) => Object.entries(weights).map(([name, w]) => `${name} ${plain(w)}`).join(", ");
