// Weights are kept as whole hundredths that sum to 100, so that the numbers beside the controls always sum to 1.

export const WHOLE = 100;

/** Whole numbers in proportion to `shares` that sum to `total`: the largest remainders are rounded up. */
export function apportion(shares, total = WHOLE) {
  const sum = shares.reduce((a, b) => a + b, 0);
  const exact = shares.map((share) => (sum > 0 ? (share / sum) * total : total / shares.length));
  const units = exact.map(Math.floor);
  const order = exact.map((_, k) => k).sort((a, b) => exact[b] - units[b] - (exact[a] - units[a]) || a - b);
  for (const k of order.slice(0, total - units.reduce((a, b) => a + b, 0))) units[k] += 1;
  return units;
}

/** The same weight for each of `count` objectives. */
export const even = (count) => apportion(Array(count).fill(1));

/** The units after one of them was set to `value`: the others share the rest in the proportions that they had. */
export function moved(units, index, value) {
  if (units.length === 1) return [WHOLE];
  const own = Math.min(WHOLE, Math.max(0, Math.round(Number.isFinite(value) ? value : units[index])));
  const rest = apportion(units.filter((_, k) => k !== index), WHOLE - own);
  rest.splice(index, 0, own);
  return rest;
}

/** {helpful: 0.7, harmless: 0.3} of the names and [70, 30]. */
export const named = (names, units) => Object.fromEntries(names.map((name, k) => [name, units[k] / WHOLE]));

/** The corners of the triangle: top, left, right; one unit high is one of weight. */
const CORNERS = [[0, 1], [-1 / Math.sqrt(3), 0], [1 / Math.sqrt(3), 0]];

/** Three weights as a point of the triangle. */
export const toPlane = (weights) => [0, 1].map((axis) => CORNERS.reduce((sum, corner, k) => sum + weights[k] * corner[axis], 0));

/** Units of the triangle's point that is nearest to (x, y). */
export function fromPlane(x, y) {
  const across = (x * Math.sqrt(3)) / 2;
  const raw = [y, (1 - y) / 2 - across, (1 - y) / 2 + across];
  // Barycentric coordinates keep angles, so the nearest point of the triangle is the nearest of the simplex: subtract
  // from all of them the number that leaves a sum of 1 after negative ones became 0.
  const sorted = [...raw].sort((a, b) => b - a);
  let sum = 0, level = 0;
  sorted.forEach((value, k) => {
    sum += value;
    if (value - (sum - 1) / (k + 1) > 0) level = (sum - 1) / (k + 1);
  });
  return apportion(raw.map((value) => Math.max(0, value - level)));
}
