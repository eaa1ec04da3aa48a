// Pure functions of the views: numbers, colours, places, words. Tested under Node (tests/js).

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

/** Where heads stand in a grid: layers down, heads across; as large as fits, and no smaller than can be seen. */
export function gridLayout(width, height, layers, heads, margin = 26, gap = 2) {
  const across = Math.floor((width - margin) / heads) - gap;
  const down = Math.floor((height - margin) / layers) - gap;
  const cell = Math.max(8, Math.min(72, across, Math.max(24, down)));
  const step = cell + gap;
  return { cell, step, margin, width: margin + heads * step, height: margin + layers * step };
}

/** The [row, column] of a grid at a point, or null. */
export function cellAt(layout, rows, columns, x, y) {
  const column = Math.floor((x - layout.margin) / layout.step);
  const row = Math.floor((y - layout.margin) / layout.step);
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
