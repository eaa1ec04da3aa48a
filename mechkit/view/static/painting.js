// Heads on canvases: the grid of all of them, and one large. Given numbers and places, no state.

import { marks, painted, shortened, toByte, visible } from "./parts.js";

export const LABELLED = 40; // tokens at most that are written on the axes

/** A canvas of this many CSS pixels, as sharp as the screen is. */
export function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

function framed(context, x, y, size, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.strokeRect(x, y, size, size);
}

/** Call draw(layer, head, x, y) for every thumbnail, where it stands. */
function placed({ margin, step, fall, caption }, rows, draw) {
  rows.forEach((row, i) => row.forEach(([layer, head], j) => draw(layer, head, margin + j * step, margin + i * fall + caption)));
}

/**
 * Every head as a thumbnail.
 *
 * layout: of gridLayout. rows: of [layer, head]; labelled: they are layers. heads: how many a layer. n: tokens.
 * strip(layer): the bytes of a layer's heads. colours: a palette. ink: for numbers.
 */
export function paintGrid(canvas, { layout, rows, labelled, heads, n, strip, colours, ink }) {
  const { cell, step, margin } = layout;
  const context = sharp(canvas, layout.width, layout.height);
  context.clearRect(0, 0, layout.width, layout.height);
  context.fillStyle = ink;
  context.font = labelled ? "11px sans-serif" : "9px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  if (labelled) {
    const every = cell >= 16 ? 1 : Math.ceil(18 / step);
    const columns = Math.max(...rows.map((row) => row.length), 0);
    for (let j = 0; j < columns; j += every) context.fillText(rows[0][j][1], margin + j * step + cell / 2, margin / 2);
    for (let i = 0; i < rows.length; i += every) context.fillText(rows[i][0][0], margin / 2, margin + i * step + cell / 2);
  } else if (cell >= 20) {
    placed(layout, rows, (layer, head, x, y) => context.fillText(`${layer}.${head}`, x + cell / 2, y - 6));
  }
  const column = new OffscreenCanvas(n, n * heads);
  context.imageSmoothingEnabled = cell < n;
  let filled = -1;
  placed(layout, rows, (layer, head, x, y) => {
    if (layer !== filled) {
      const bytes = strip(layer);
      if (bytes.length < heads * n * n) return;
      column.getContext("2d").putImageData(new ImageData(painted(bytes, colours), n, n * heads), 0, 0);
      filled = layer;
    }
    context.drawImage(column, 0, head * n, n, n, x, y, cell, cell);
  });
}

/**
 * What marks thumbnails, over them: rings by score, what is chosen, edited and in focus.
 *
 * dark: the paper is. scores: one a head or null. selected, changed: sets of "layer.head". focused: [layer, head].
 */
export function paintMarks(canvas, { layout, rows, heads, ink, dark, scores, selected, changed, focused }) {
  const colours = marks(dark);
  const { cell } = layout;
  const context = sharp(canvas, layout.width, layout.height);
  context.clearRect(0, 0, layout.width, layout.height);
  const largest = scores ? Math.max(...scores.map((value) => Math.abs(value ?? 0))) || 1 : 1;
  placed(layout, rows, (layer, head, x, y) => {
    const name = `${layer}.${head}`;
    const value = scores ? scores[layer * heads + head] : null;
    if (value !== null && Math.abs(value) > 0.02 * largest) {
      context.setLineDash(value > 0 ? [] : [3, 2]);
      framed(context, x - 0.5, y - 0.5, cell + 1, value > 0 ? colours.for : colours.against, 1 + (2 * Math.abs(value)) / largest);
      context.setLineDash([]);
    }
    if (selected.has(name)) framed(context, x, y, cell, ink, 1.5);
    if (changed.has(name)) {
      context.strokeStyle = colours.edited;
      context.lineWidth = 1.5;
      context.beginPath();
      context.moveTo(x + 1, y + 1);
      context.lineTo(x + cell - 1, y + cell - 1);
      context.stroke();
    }
    if (layer === focused[0] && head === focused[1]) framed(context, x - 1, y - 1, cell + 2, colours.focus, 2.5);
  });
}

/** How large the map of one head is in so much room, and the margin for tokens on its axes. */
export function mapLayout(room, n) {
  const margin = n <= LABELLED ? 74 : 0;
  return { margin, side: Math.max(140, Math.min(400, room) - margin) };
}

/**
 * One head, large.
 *
 * layout: of mapLayout. values: [query, key], row by row. tokens: of both axes. limit: what has the full colour.
 * row: the query that is marked, or null.
 */
export function paintMap(canvas, { layout, values, tokens, signed, limit, colours, ink, row }) {
  const { margin, side } = layout;
  const n = tokens.length;
  const context = sharp(canvas, side + margin, side + margin);
  const bytes = Uint8Array.from(values, (value) => toByte(value / (limit || 1), signed));
  const one = new OffscreenCanvas(n, n);
  one.getContext("2d").putImageData(new ImageData(painted(bytes, colours), n, n), 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(one, margin, 0, side, side);
  if (margin) label(context, layout, tokens, ink);
  if (row !== null) {
    context.strokeStyle = marks(false).focus;
    context.lineWidth = 2;
    context.strokeRect(margin, (row * side) / n, side, side / n);
  }
}

/** Tokens beside the rows, and under the columns, of the large map. */
function label(context, { margin, side }, tokens, ink) {
  const step = side / tokens.length;
  context.fillStyle = ink;
  context.font = `${Math.max(8, Math.min(11, step - 1))}px sans-serif`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  tokens.forEach((token, i) => {
    const text = shortened(visible(token).trim(), 11);
    context.fillText(text, margin - 5, (i + 0.5) * step);
    context.save();
    context.translate(margin + (i + 0.5) * step, side + 5);
    context.rotate(-Math.PI / 2);
    context.fillText(text, 0, 0);
    context.restore();
  });
}
