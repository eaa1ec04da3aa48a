// Pure functions of the views: numbers, colours, places, words. Tested under Node (tests/js).

/** Colours of marks on light or dark paper, told apart by colour-blind readers; what they mean is also drawn or written. */
export function marks(dark) {
  return { focus: "#E69F00", edited: dark ? "#FF6B5A" : "#CC3311", for: dark ? "#56B4E9" : "#0072B2", against: dark ? "#F58A4B" : "#D55E00" };
}

/** Half-precision bits to numbers. */
export function fromHalf(bits) {
  const out = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const b = bits[i];
    const sign = b & 0x8000 ? -1 : 1;
    const exponent = (b >> 10) & 31;
    const fraction = b & 1023;
    if (exponent === 0) out[i] = (sign * fraction) / 16777216;
    else if (exponent === 31) out[i] = fraction ? NaN : sign * Infinity;
    else out[i] = sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
  }
  return out;
}

/** Bytes of a map to numbers: 0 to 255 is 0 to limit; of a signed map, 1 to 255 is -limit to limit. */
export function fromByte(byte, signed, limit) {
  return signed ? ((byte - 128) / 127) * limit : (byte / 255) * limit;
}

/** A share from -1 to 1 (signed) or 0 to 1 as a byte; the reverse of fromByte. */
export function toByte(share, signed) {
  const inside = Math.max(signed ? -1 : 0, Math.min(1, share));
  return signed ? 128 + Math.round(127 * inside) : Math.round(255 * inside);
}

/**
 * Which heads a grid shows, row by row: [layer, head], and whether rows and columns are layers and heads.
 *
 * layer, column: only that layer, only that head of each; -1: all. column -2: the chosen ones ("layer.head").
 * scores: one a head, or null: the largest in size first.
 */
export function arranged({ layers, heads, layer, column, chosen, scores }) {
  const count = (n) => Array.from({ length: n }, (_, i) => i);
  const picked = new Set(chosen);
  const kept = (l, h) => (layer < 0 || l === layer) && (column === -2 ? picked.has(`${l}.${h}`) : column < 0 || h === column);
  const rows = count(layers).map((l) => count(heads).filter((h) => kept(l, h)).map((h) => [l, h]));
  if (!scores && column === -1) return { rows: rows.filter((row) => row.length), labelled: true };
  const flat = rows.flat();
  const size = ([l, h]) => Math.abs(scores[l * heads + h] ?? 0);
  if (scores) flat.sort((one, other) => size(other) - size(one));
  const wide = Math.max(6, Math.ceil(Math.sqrt(1.2 * flat.length)));
  return { rows: count(Math.ceil(flat.length / wide)).map((i) => flat.slice(i * wide, (i + 1) * wide)), labelled: false };
}

/** Where a head stands among rows of heads: [row, column], or null. */
export function placeOf(rows, [layer, head]) {
  for (const [row, one] of rows.entries()) {
    const column = one.findIndex(([l, h]) => l === layer && h === head);
    if (column >= 0) return [row, column];
  }
  return null;
}

/**
 * Where thumbnails stand: as large as fits, and no smaller than can be seen. Beside them there is a margin for numbers
 * of layers and heads; where these are no rows and columns, each thumbnail has a caption above it instead.
 */
export function gridLayout(width, height, rows, columns, labelled = true) {
  const [margin, gap, caption] = labelled ? [26, 2, 0] : [4, 2, 13];
  const across = Math.floor((width - margin) / columns) - gap;
  const down = Math.floor((height - margin) / rows) - gap - caption;
  const cell = Math.max(8, Math.min(72, across, Math.max(24, down)));
  const [step, fall] = [cell + gap, cell + gap + caption];
  return { cell, step, fall, margin, caption, width: margin + columns * step, height: margin + rows * fall };
}

/** The [row, column] of a grid at a point, or null. */
export function cellAt({ margin, step, fall }, rows, columns, x, y) {
  const column = Math.floor((x - margin) / step);
  const row = Math.floor((y - margin) / fall);
  return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
}

/** The row or column after a key, in a grid that does not wrap. */
export function moved(key, row, column, rows, columns) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
  if (key === "Home") return [row, 0];
  if (key === "End") return [row, columns - 1];
  if (key === "PageUp") return [0, column];
  if (key === "PageDown") return [rows - 1, column];
  if (!by) return null;
  return [Math.min(rows - 1, Math.max(0, row + by[0])), Math.min(columns - 1, Math.max(0, column + by[1]))];
}

/** Colours of the 256 byte values. One hue for attention; blue over the page's colour to orange for signed maps. */
export function palette(signed, dark) {
  const paper = dark ? [24, 26, 31] : [255, 255, 255];
  const strong = dark ? [126, 182, 255] : [8, 48, 107];
  const against = dark ? [255, 176, 84] : [158, 66, 3];
  const out = new Uint8ClampedArray(256 * 4);
  for (let i = 0; i < 256; i++) {
    const value = signed ? (i - 128) / 127 : i / 255;
    const end = value < 0 ? against : strong;
    const share = Math.min(1, Math.abs(value)) ** 0.7; // small weights are seen
    for (let c = 0; c < 3; c++) out[4 * i + c] = paper[c] + share * (end[c] - paper[c]);
    out[4 * i + 3] = 255;
  }
  return out;
}

/** Bytes as pixels, by a palette. */
export function painted(bytes, colours) {
  const pixels = new Uint32Array(bytes.length);
  const table = new Uint32Array(colours.buffer);
  for (let i = 0; i < bytes.length; i++) pixels[i] = table[bytes[i]];
  return new Uint8ClampedArray(pixels.buffer);
}

/** The colour behind a token with a score: blue for, orange against, half transparent so that text stays readable. */
export function tokenColour(score, limit) {
  return `rgba(${score < 0 ? "230,159,0" : "0,114,178"},${Math.min(0.6, (0.6 * Math.abs(score)) / (limit || 1)).toFixed(3)})`;
}

/** A token as it can be seen: line ends, tabs and other controls named, blanks shown where there is nothing else. */
export function visible(token) {
  const named = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const shown = Array.from(token, (c) => named[c] ?? (/\p{Cc}|\p{Cf}/u.test(c) ? "�" : c)).join("");
  return shown.trim() === "" ? "␣".repeat(Math.max(1, shown.length)) : shown;
}

/** At most so many characters of a text. */
export function shortened(text, most) {
  const characters = Array.from(text);
  return characters.length <= most ? text : `${characters.slice(0, most - 1).join("")}…`;
}

/** Edits with one more: of the same head and kind the new one takes the old one's place; scale 1 takes it away. */
export function edited(edits, next) {
  const rest = edits.filter((one) => one.head !== next.head);
  return next.how === "scale" && next.alpha === 1 ? rest : [...rest, next];
}

/** What an edit is called. */
export function told(edit) {
  if (edit.how === "ablate") return `${edit.head} ablated`;
  if (edit.how === "patch") return `${edit.head} from the other prompt`;
  return `${edit.head} × ${Number(edit.alpha).toFixed(2)}`;
}

/** A number with three figures and its sign. */
export function number(value) {
  const text = Math.abs(value) >= 0.001 || value === 0 ? Math.abs(value).toFixed(3) : Math.abs(value).toExponential(1);
  return `${value < 0 ? "−" : "+"}${text}`;
}

/** A list with some more, or without them where it had them all. */
export function toggled(list, some) {
  if (some.every((one) => list.includes(one))) return list.filter((one) => !some.includes(one));
  return [...new Set([...list, ...some])];
}
