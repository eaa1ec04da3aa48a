// The map of scores on a canvas. Given numbers and places, no state.

import { sharp } from "./painting.js";
import { marks, toByte } from "./parts.js";

/** How large the cells are: as wide as there is room for, and a margin for the names of rows. */
export function scoreLayout(room, rows, columns, letters) {
  const margin = 10 + 7 * Math.max(1, letters);
  const wide = Math.max(9, Math.min(38, Math.floor((room - margin) / columns)));
  const high = rows > 40 ? 11 : Math.max(13, Math.min(24, wide));
  return { margin, wide, high, width: margin + columns * wide, height: rows * high + 32 };
}

/** Whether white is easier to read than black on a colour of a palette. */
export function needsWhite(colours, byte) {
  const [r, g, b] = colours.subarray(4 * byte, 4 * byte + 3);
  return 0.299 * r + 0.587 * g + 0.114 * b < 130;
}

/**
 * Scores by row and layer.
 *
 * layout: of scoreLayout. rows, columns: names. cells: {row, column, site, score}. numbered: cells whose number is
 * written. selected: a set of sites. focused: a cell or undefined. colours: a signed palette. ink: for names.
 */
export function paintScores(canvas, { layout, rows, columns, cells, numbered, selected, focused, colours, ink }) {
  const { margin, wide, high } = layout;
  const context = sharp(canvas, layout.width, layout.height);
  const limit = Math.max(...cells.map((cell) => Math.abs(cell.score))) || 1;
  const colour = (byte) => `rgb(${colours.subarray(4 * byte, 4 * byte + 3).join(",")})`;
  context.clearRect(0, 0, layout.width, layout.height);
  context.font = "11px sans-serif";
  context.textBaseline = "middle";
  context.fillStyle = ink;
  context.textAlign = "right";
  rows.forEach((name, i) => (high >= 13 || i % 2 === 0) && context.fillText(name, margin - 6, (i + 0.5) * high));
  context.textAlign = "center";
  const every = Math.ceil(20 / wide);
  for (let j = 0; j < columns.length; j += every) {
    context.fillText(columns[j], margin + (j + 0.5) * wide, rows.length * high + 9);
  }
  context.fillText("layer", margin + (columns.length * wide) / 2, rows.length * high + 23);
  for (const { row, column, score } of cells) {
    context.fillStyle = colour(toByte(score / limit, true));
    context.fillRect(margin + column * wide, row * high, wide - 1, high - 1);
  }
  context.font = `${Math.min(10, wide / 2.6)}px sans-serif`;
  for (const { row, column, score } of wide >= 20 ? numbered : []) {
    context.fillStyle = needsWhite(colours, toByte(score / limit, true)) ? "#fff" : "#000";
    const text = score.toFixed(2).replace("0.", ".");
    context.fillText(text, margin + (column + 0.5) * wide - 0.5, (row + 0.5) * high);
  }
  context.strokeStyle = ink;
  context.lineWidth = 1.5;
  for (const cell of cells) if (selected.has(cell.site)) frame(context, layout, cell, 0.5);
  context.strokeStyle = marks(false).focus;
  context.lineWidth = 2.5;
  if (focused) frame(context, layout, focused, -1);
}

function frame(context, { margin, wide, high }, { row, column }, inside) {
  const [x, y] = [margin + column * wide + inside, row * high + inside];
  context.strokeRect(x, y, wide - 1 - 2 * inside, high - 1 - 2 * inside);
}
