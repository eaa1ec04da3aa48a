// How the attention view is painted, from its state: the grid and its marks, the head in focus, the tokens' colours.
//
// A subclass has built the elements that are painted on: grid, marks, gridBox, large, largeBox, words, menus.

import { bytesOf } from "./elements.js";
import { Frame, reveal } from "./frame.js";
import { mapLayout, paintGrid, paintMap, paintMarks } from "./painting.js";
import { arranged, fromByte, fromHalf, gridLayout, palette, placeOf, tokenColour, visible } from "./parts.js";

export class AttentionPainting extends Frame {
  get focused() {
    return this.model.get("head").split(".").map(Number);
  }

  /** The locked token, or null. */
  get locked() {
    const token = this.model.get("token");
    return token < 0 ? null : token;
  }

  mapIndex() {
    return Math.max(0, this.about.maps.findIndex((one) => one.name === this.model.get("map")));
  }

  /** The exact values of the head in focus where they have arrived, else those of its bytes. */
  focusValues() {
    const [layer, head] = this.focused;
    const { signed, limit, name } = this.about.maps[this.mapIndex()];
    const exact = this.model.get("exact_of") === `${name}|${layer}.${head}`;
    this.figures = exact ? 3 : Math.max(0, Math.min(3, Math.ceil(-Math.log10(limit / 255)))); // what a byte can tell
    if (exact) {
      const bytes = bytesOf(this.model.get("exact_values"));
      return fromHalf(new Uint16Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)));
    }
    const { layers, heads, tokens } = this.about;
    const size = tokens.length ** 2;
    const start = ((this.mapIndex() * layers + layer) * heads + head) * size;
    return Float32Array.from(this.bytes.subarray(start, start + size), (byte) => fromByte(byte, signed, limit));
  }

  /** The heads of the grid, row by row; see `arranged`. */
  get rows() {
    const { layers, heads, scores } = this.about;
    const [layer, column, order] = ["layer", "column", "order"].map((name) => this.model.get(name));
    return arranged({ layers, heads, layer, column, chosen: this.model.get("selection"), scores: order === "score" && scores?.values });
  }

  paintAll() {
    this.paintGrid();
    this.paintFocus();
  }

  /** The thumbnails where they are not painted yet, and what marks them. */
  paintGrid() {
    const { heads, layers, tokens, maps, scores } = this.about;
    const map = this.mapIndex();
    const { rows, labelled } = this.rows;
    const size = heads * tokens.length ** 2;
    const wide = this.root.clientWidth || 900;
    const across = Math.max(...rows.map((row) => row.length), 1);
    this.layout = gridLayout(wide < 720 ? wide : 0.42 * wide, 620, rows.length, across, labelled);
    for (const [name, one] of Object.entries(this.menus)) one.select.value = String(this.model.get(name));
    const painting = { layout: this.layout, rows, labelled, heads, ink: this.ink, dark: this.dark };
    const sign = JSON.stringify([this.layout, rows, map, this.dark, this.ink, devicePixelRatio]);
    if (sign !== this.gridIs || this.bytes !== this.bytesAre) {
      const strip = (layer) => this.bytes.subarray((map * layers + layer) * size, (map * layers + layer + 1) * size);
      paintGrid(this.grid, { ...painting, n: tokens.length, strip, colours: palette(maps[map].signed, this.dark) });
      [this.gridIs, this.bytesAre] = [sign, this.bytes];
    }
    paintMarks(this.marks, {
      ...painting,
      scores: scores?.values,
      selected: new Set(this.model.get("selection")),
      changed: new Set(this.asking.edits.map((edit) => edit.head)),
      focused: this.focused,
    });
  }

  /** Scroll the grid to the head in focus. */
  reveal() {
    const place = placeOf(this.rows.rows, this.focused);
    if (!place) return;
    const { margin, step, fall } = this.layout;
    reveal(this.gridBox, margin + place[1] * step, margin + place[0] * fall, step, fall);
  }

  paintFocus() {
    const { tokens, maps } = this.about;
    const { signed, limit } = maps[this.mapIndex()];
    this.values = this.focusValues();
    this.largeLayout = mapLayout(this.largeBox.clientWidth || 320, tokens.length);
    paintMap(this.large, {
      layout: this.largeLayout,
      values: this.values,
      tokens,
      signed,
      limit,
      colours: palette(signed, this.dark),
      ink: this.ink,
      row: this.hoverToken ?? this.locked,
    });
    this.paintWords();
  }

  paintWords() {
    const { tokens, maps } = this.about;
    const row = this.hoverToken ?? this.locked;
    const limit = maps[this.mapIndex()].limit || 1;
    Array.from(this.words.children).forEach((word, i) => {
      const seen = row !== null && i <= row;
      const value = seen ? this.values[row * tokens.length + i] : 0;
      word.style.background = value ? tokenColour(value, limit) : "";
      word.classList.toggle("mk-from", i === row);
      word.setAttribute("aria-pressed", String(i === this.locked));
      word.title = seen ? `${visible(tokens[i])}: ${value.toFixed(this.figures)}` : visible(tokens[i]);
    });
  }
}
