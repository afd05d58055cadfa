// What a run's front says of weights between those that were measured.

/** Solve `matrix` s = `right` by elimination; null where there is no single solution. */
function solved(matrix, right) {
  const rows = matrix.map((row, i) => [...row, right[i]]);
  const size = rows.length;
  for (let k = 0; k < size; k++) {
    const pivot = rows.slice(k).reduce((best, row, i) => (Math.abs(row[k]) > Math.abs(rows[best][k]) ? k + i : best), k);
    if (Math.abs(rows[pivot][k]) < 1e-9) return null;
    [rows[k], rows[pivot]] = [rows[pivot], rows[k]];
    for (let i = 0; i < size; i++) {
      if (i === k) continue;
      const factor = rows[i][k] / rows[k][k];
      for (let j = k; j <= size; j++) rows[i][j] -= factor * rows[k][j];
    }
  }
  return rows.map((row, k) => row[size] / row[k]);
}

function* subsets(items, size, from = 0) {
  if (size === 0) { yield []; return; }
  for (let i = from; i <= items.length - size; i++) for (const rest of subsets(items, size - 1, i + 1)) yield [items[i], ...rest];
}

const distance = (a, b) => Math.hypot(...a.map((value, k) => value - b[k]));

/** Points of the grid around the weights, with the share of each: [[point, share], ...]; the nearest alone where none are around. */
export function around(points, weights) {
  const near = [...points].sort((a, b) => distance(a.weights, weights) - distance(b.weights, weights)).slice(0, 12);
  if (!near.length) return [];
  if (distance(near[0].weights, weights) < 1e-9) return [[near[0], 1]];
  let best = null, least = Infinity;
  for (const corners of subsets(near, weights.length)) {
    const reach = corners.reduce((sum, point) => sum + distance(point.weights, weights), 0);
    if (reach >= least) continue;
    const shares = solved(weights.map((_, k) => corners.map((point) => point.weights[k])), weights);
    if (shares && shares.every((share) => share > -1e-9)) [best, least] = [corners.map((point, i) => [point, shares[i]]), reach];
  }
  return best ? best.filter(([, share]) => share > 1e-9) : [[near[0], 1]];
}

/**
 * The front at weights by name: {reward: {name: {mean, lo, hi}}, kl, cost, between, how}, where `how` is "measured",
 * "interpolated" or "nearest"; means and interval ends go linearly between the points around. null where it has no such weights.
 */
export function along(front, weights) {
  const known = Object.keys(weights).length === front.objectives.length && front.objectives.every((name) => name in weights);
  const points = front.points.filter((point) => point.weights);
  if (!known || !points.length) return null;
  const own = front.objectives.map((name) => weights[name]);
  const shares = around(points, own);
  const mixed = (read) => shares.reduce((sum, [point, share]) => sum + share * read(point), 0);
  const reward = Object.fromEntries(front.objectives.map((name, k) =>
    [name, Object.fromEntries(["mean", "lo", "hi"].map((end) => [end, mixed((point) => point.reward[k][end])]))]));
  const how = shares.length > 1 ? "interpolated" : distance(shares[0][0].weights, own) < 1e-9 ? "measured" : "nearest";
  const between = shares.map(([point]) => point.weights);
  return { reward, kl: mixed((point) => point.kl), cost: mixed((point) => point.cost), between, how };
}

/** A front's name among the others. */
export const title = (front) => front.candidates > 1 ? `${front.method}, n = ${front.candidates}` : front.method;

/** The front that was measured of a method, null where none is known to be. */
export function frontOf(offer, fronts) {
  const named = fronts.find((front) => front.method === offer.method);
  if (named) return named;
  const best = /^best-of-(\d+)$/.exec(offer.method);
  if (best) return fronts.find((front) => front.method === "best-of-n" && front.candidates === Number(best[1])) ?? null;
  // A sweep names values by their form, and the folder that serves them by itself; only values read a KL budget.
  return (offer.reads.includes("kl_budget") && fronts.find((front) => front.method === "single-pass" || front.method === "prefix")) || null;
}
