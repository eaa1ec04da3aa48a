// Where the parts of a circuit stand: layers from bottom to top, positions (or heads) from left to right. Pure.

const BOX = { wide: 46, high: 20 };
const ROW = 46; // between two rows
const GAP = 10; // between two parts of a row and column
const TOP = 14;
const FOOT = 34; // for the names of columns

/** Rows from bottom to top: the embedding, of each layer its heads and its MLP, the logits; only where there is a part. */
function rowKey({ kind, layer }) {
  if (kind === "embed") return -1;
  if (kind === "logits") return Infinity;
  return 2 * layer + (kind === "mlp" ? 1 : 0);
}

/**
 * Parts, those of a group as one: {name, sites, kind, layer, column, score, order}.
 *
 * nodes: {site, kind, layer, column, score, order}. groups: {name, sites}. A group stands where its largest part does.
 */
export function grouped(nodes, groups) {
  const size = (node) => Math.abs(node.score ?? 0);
  const inGroup = new Set(groups.flatMap(({ sites }) => sites));
  const alone = nodes.filter(({ site }) => !inGroup.has(site)).map((node) => ({ ...node, name: node.site, sites: [node.site] }));
  const together = groups.map(({ name, sites }) => {
    const members = nodes.filter(({ site }) => sites.includes(site));
    if (!members.length) return null;
    const first = members.reduce((best, node) => (size(node) > size(best) ? node : best));
    const order = Math.min(...members.map((node) => node.order));
    const score = members.reduce((sum, node) => sum + (node.score ?? 0), 0);
    return { ...first, name, sites: members.map(({ site }) => site), order, score, group: true };
  });
  return [...alone, ...together.filter(Boolean)];
}

/**
 * Lines between parts: {from, to, slot, score, edges}, those of one slot between the same two parts together.
 *
 * parts: of `grouped`. edges: {edge, source, readers, slot, score}.
 */
export function lines(parts, edges) {
  const part = new Map(parts.flatMap((one) => one.sites.map((site) => [site, one])));
  const found = new Map();
  for (const edge of edges) {
    const from = part.get(edge.source);
    for (const reader of edge.readers) {
      const to = part.get(reader);
      if (!from || !to || from === to) continue;
      const slot = to.group ? "" : edge.slot;
      const key = `${from.name}|${to.name}|${slot}`;
      const line = found.get(key) ?? { from: from.name, to: to.name, slot, score: 0, edges: [] };
      if (!line.edges.includes(edge.edge)) {
        line.score += edge.score; // once, though several parts of a group may read it
        line.edges.push(edge.edge);
      }
      found.set(key, line);
    }
  }
  return [...found.values()];
}

/**
 * Boxes {name: {x, y, wide, high}} (x, y: their middle), the columns' middles, the rows, and the size of it all.
 *
 * parts: of `grouped`. columns: their names. width: that there is at least.
 */
export function layered(parts, columns, width) {
  const keys = [...new Set(parts.map(rowKey))].sort((one, other) => one - other);
  const cells = new Map();
  for (const part of parts) {
    const place = `${keys.indexOf(rowKey(part))},${part.column}`;
    cells.set(place, [...(cells.get(place) ?? []), part]);
  }
  const boxWide = (part) => Math.max(BOX.wide, 7.2 * Array.from(part.name).length + 10);
  const spread = (some) => some.reduce((sum, part) => sum + boxWide(part) + GAP, 0);
  const needed = columns.map((_, column) =>
    Math.max(30, ...[...cells].filter(([place]) => place.endsWith(`,${column}`)).map(([, some]) => spread(some))),
  );
  const margin = 46;
  const total = needed.reduce((sum, one) => sum + one, 0);
  const stretch = Math.max(1, (width - margin) / total);
  const starts = needed.map((_, i) => margin + stretch * needed.slice(0, i).reduce((sum, one) => sum + one, 0));
  const middles = needed.map((one, i) => starts[i] + (stretch * one) / 2);
  const height = TOP + keys.length * ROW + FOOT;
  const boxes = {};
  for (const [place, some] of cells) {
    const [row, column] = place.split(",").map(Number);
    let x = middles[column] - spread(some) / 2;
    some.sort((one, other) => (one.head ?? 0) - (other.head ?? 0));
    for (const part of some) {
      const wide = boxWide(part);
      boxes[part.name] = { x: x + GAP / 2 + wide / 2, y: height - FOOT - (row + 0.5) * ROW, wide, high: BOX.high };
      x += wide + GAP;
    }
  }
  const named = keys.map((key, row) => {
    const text = key === -1 ? "embed" : key === Infinity ? "logits" : key % 2 ? `MLP ${(key - 1) / 2}` : `layer ${key / 2}`;
    return { text, y: height - FOOT - (row + 0.5) * ROW };
  });
  return { boxes, middles, rows: named, width: margin + stretch * total, height };
}

const PORTS = { q: -0.3, k: 0, v: 0.3 };

/** The four points of a line's curve, from the upper edge of one box to the lower edge of another. */
export function curveOf(boxes, line) {
  const [from, to] = [boxes[line.from], boxes[line.to]];
  const end = { x: to.x + (PORTS[line.slot] ?? 0) * to.wide, y: to.y + to.high / 2 };
  const start = { x: from.x, y: from.y - from.high / 2 };
  const bend = Math.max(12, 0.45 * Math.abs(start.y - end.y));
  return [start, { x: start.x, y: start.y - bend }, { x: end.x, y: end.y + bend }, end];
}

/** A point of a curve, at a share from 0 to 1 of the way. */
export function along([a, b, c, d], share) {
  const rest = 1 - share;
  const [ka, kb, kc, kd] = [rest ** 3, 3 * rest ** 2 * share, 3 * rest * share ** 2, share ** 3];
  return { x: ka * a.x + kb * b.x + kc * c.x + kd * d.x, y: ka * a.y + kb * b.y + kc * c.y + kd * d.y };
}

/** The name of the box at a point, or null. */
export function boxAt(boxes, x, y) {
  const inside = ([, box]) => Math.abs(x - box.x) <= box.wide / 2 && Math.abs(y - box.y) <= box.high / 2 + 2;
  return Object.entries(boxes).find(inside)?.[0] ?? null;
}

/** The line nearest to a point, if one is within `most` pixels. */
export function lineAt(boxes, all, x, y, most = 5) {
  let [best, found] = [most, null];
  for (const line of all) {
    const curve = curveOf(boxes, line);
    for (let i = 0; i <= 32; i++) {
      const point = along(curve, i / 32);
      const away = Math.hypot(point.x - x, point.y - y);
      if (away < best) [best, found] = [away, line];
    }
  }
  return found;
}

/** The box that an arrow key leads to from one: the nearest in that direction, or null. */
export function towards(boxes, name, key) {
  const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
  const from = boxes[name];
  if (!step || !from) return null;
  let [best, found] = [Infinity, null];
  for (const [other, box] of Object.entries(boxes)) {
    const [x, y] = [box.x - from.x, box.y - from.y];
    const [ahead, aside] = [x * step[0] + y * step[1], Math.abs(x * step[1]) + Math.abs(y * step[0])];
    if (other === name || ahead < 4) continue;
    const away = ahead + 2 * aside;
    if (away < best) [best, found] = [away, other];
  }
  return found;
}
