// A circuit and its faithfulness curve on canvases. Given places and numbers, no state.

import { along, curveOf } from "./layers.js";
import { sharp } from "./painting.js";
import { marks, shortened, visible } from "./parts.js";

function strokeCurve(context, [a, b, c, d]) {
  context.beginPath();
  context.moveTo(a.x, a.y);
  context.bezierCurveTo(b.x, b.y, c.x, c.y, d.x, d.y);
  context.stroke();
}

/**
 * The circuit.
 *
 * layout: of layered. parts: of grouped. lines: of lines. columns: names. ink, paper: colours of text and page, which may be dark.
 * selected: set of sites. focus: name of a part. line: the line in focus, or null. cuts: set of edges and sites.
 */
export function paintCircuit(canvas, { layout, parts, lines, columns, ink, paper, dark, selected, focus, line, cuts }) {
  const own = marks(dark);
  const { boxes, middles, rows } = layout;
  const context = sharp(canvas, layout.width, layout.height);
  context.clearRect(0, 0, layout.width, layout.height);
  context.font = "11px sans-serif";
  context.textBaseline = "middle";
  context.fillStyle = ink;
  context.globalAlpha = 0.65;
  context.textAlign = "left";
  for (const { text, y } of rows) context.fillText(text, 4, y);
  context.textAlign = "center";
  const room = middles.length > 1 ? Math.floor((middles[1] - middles[0]) / 6.5) : 20;
  columns.forEach((name, i) => context.fillText(shortened(visible(name).trim(), Math.max(4, room)), middles[i], layout.height - 12));
  context.globalAlpha = 1;
  const largest = Math.max(...lines.map((one) => Math.abs(one.score)), 0) || 1;
  const gone = new Set(parts.filter((part) => part.sites.every((site) => cuts.has(site))).map((part) => part.name));
  const isCut = (one) => one.edges.every((edge) => cuts.has(edge)) || gone.has(one.from) || gone.has(one.to);
  const near = (one) => one === line || one.from === focus || one.to === focus;
  for (const one of [...lines].sort((a, b) => Number(near(a)) - Number(near(b)))) {
    const curve = curveOf(boxes, one);
    const share = Math.abs(one.score) / largest;
    context.setLineDash(isCut(one) ? [2, 5] : one.score < 0 ? [6, 3] : []);
    context.strokeStyle = isCut(one) ? ink : one.score < 0 ? own.against : own.for;
    context.lineWidth = isCut(one) ? 1.2 + (one === line) : one === line ? 3 + 4 * share : 0.8 + 4 * share;
    context.globalAlpha = near(one) ? 0.95 : 0.18 + 0.5 * share;
    strokeCurve(context, curve);
    context.setLineDash([]);
    context.globalAlpha = 1;
    if (isCut(one)) cross(context, along(curve, 0.5), 4, own.edited);
  }
  const strongest = Math.max(...parts.map((part) => Math.abs(part.score ?? 0)), 0) || 1;
  for (const part of parts) {
    const { x, y, wide, high } = boxes[part.name];
    const share = Math.abs(part.score ?? 0) / strongest;
    context.beginPath();
    context.roundRect(x - wide / 2, y - high / 2, wide, high, part.kind === "z" ? 9 : 2);
    context.fillStyle = paper;
    context.fill();
    context.globalAlpha = 0.1 + 0.45 * share;
    context.fillStyle = (part.score ?? 0) < 0 ? own.against : own.for;
    if (part.score !== null) context.fill();
    context.globalAlpha = 1;
    const chosen = part.sites.some((site) => selected.has(site));
    context.strokeStyle = part.name === focus ? own.focus : ink;
    context.lineWidth = part.name === focus ? 3 : chosen ? 2.2 : 0.7;
    context.setLineDash((part.score ?? 0) < 0 ? [4, 2] : []);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = ink;
    context.font = `${chosen ? "bold " : ""}11px sans-serif`;
    context.fillText(part.name, x, y + 0.5);
    if (gone.has(part.name)) cross(context, { x, y }, 9, own.edited);
  }
}

function cross(context, { x, y }, arm, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x - arm, y - arm);
  context.lineTo(x + arm, y + arm);
  context.moveTo(x + arm, y - arm);
  context.lineTo(x - arm, y + arm);
  context.stroke();
}

/**
 * Faithfulness by size, and where the circuit is on it.
 *
 * points: {size, faithfulness}, from small to large. size: what is shown. now: its faithfulness, or null.
 */
export function paintCurve(canvas, { width, points, size, now, ink, dark }) {
  const own = marks(dark);
  const height = 150;
  const [left, right, top, bottom] = [34, 8, 8, 30];
  const context = sharp(canvas, width, height);
  context.clearRect(0, 0, width, height);
  const values = [0, 1, ...points.map((one) => one.faithfulness), ...(now === null ? [] : [now])];
  const [low, high] = [Math.max(-1, Math.min(...values)), Math.min(2, Math.max(...values)) + 0.05];
  const last = Math.max(...points.map((one) => one.size), 1);
  const x = (value) => left + (value / last) * (width - left - right);
  const y = (value) => top + ((high - Math.max(low, Math.min(high, value))) / (high - low)) * (height - top - bottom);
  context.font = "11px sans-serif";
  context.fillStyle = ink;
  context.strokeStyle = ink;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const value of [0, 1]) {
    context.globalAlpha = 0.4;
    context.setLineDash(value ? [4, 3] : []);
    context.beginPath();
    context.moveTo(left, y(value));
    context.lineTo(width - right, y(value));
    context.stroke();
    context.globalAlpha = 1;
    context.fillText(String(value), left - 6, y(value));
  }
  context.setLineDash([]);
  context.textAlign = "center";
  for (const value of [0, Math.round(last / 2), last]) context.fillText(value, x(value), height - bottom + 9);
  context.fillText("members left in", (left + width - right) / 2, height - 7);
  context.strokeStyle = own.for;
  context.fillStyle = own.for;
  context.lineWidth = 2;
  context.beginPath();
  points.forEach((one, i) => context[i ? "lineTo" : "moveTo"](x(one.size), y(one.faithfulness)));
  context.stroke();
  for (const one of points) dot(context, x(one.size), y(one.faithfulness), 2.5);
  if (now === null) return;
  context.fillStyle = own.focus;
  dot(context, x(size), y(now), 5);
}

function dot(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}
