// Pure functions of the views: node --test tests/js
import assert from "node:assert/strict";
import test from "node:test";

import * as view from "../../mechkit/view/static/parts.js";

test("half precision comes back as numbers", () => {
  const bits = [0x0000, 0x3c00, 0xbc00, 0x3555, 0x7bff, 0x0001, 0x8000];
  const numbers = [0, 1, -1, 0.333251953125, 65504, 2 ** -24, -0];
  assert.deepEqual(Array.from(view.fromHalf(new Uint16Array(bits))), numbers);
  assert.equal(view.fromHalf(new Uint16Array([0x7c00]))[0], Infinity);
  assert.ok(Number.isNaN(view.fromHalf(new Uint16Array([0x7e00]))[0]));
});

test("bytes stand for 0 to limit, or -limit to limit", () => {
  assert.equal(view.fromByte(255, false, 2), 2);
  assert.equal(view.fromByte(0, false, 2), 0);
  assert.equal(view.fromByte(128, true, 3), 0);
  assert.equal(view.fromByte(1, true, 3), -3);
  assert.equal(view.fromByte(255, true, 3), 3);
});

test("every cell of a grid is found at its middle, and nothing beside the grid", () => {
  for (const [width, layers, heads] of [[500, 30, 9], [300, 12, 12], [900, 2, 32], [200, 3, 1]]) {
    const layout = view.gridLayout(width, 600, layers, heads);
    for (const [row, column] of [[0, 0], [layers - 1, heads - 1], [layers - 1, 0]]) {
      const x = layout.margin + column * layout.step + layout.cell / 2;
      const y = layout.margin + row * layout.step + layout.cell / 2;
      assert.deepEqual(view.cellAt(layout, layers, heads, x, y), [row, column]);
    }
    assert.equal(view.cellAt(layout, layers, heads, 3, 3), null);
    assert.equal(view.cellAt(layout, layers, heads, layout.width + 1, layout.margin + 1), null);
  }
});

test("keys move by one, to the edges, and never out of the grid", () => {
  assert.deepEqual(view.moved("ArrowUp", 0, 3, 5, 8), [0, 3]);
  assert.deepEqual(view.moved("ArrowDown", 0, 3, 5, 8), [1, 3]);
  assert.deepEqual(view.moved("ArrowRight", 2, 7, 5, 8), [2, 7]);
  assert.deepEqual(view.moved("Home", 2, 7, 5, 8), [2, 0]);
  assert.deepEqual(view.moved("PageDown", 2, 7, 5, 8), [4, 7]);
  assert.equal(view.moved("a", 2, 7, 5, 8), null);
});

test("colours begin at the page's own, and get steadily further from it", () => {
  for (const dark of [false, true]) {
    for (const signed of [false, true]) {
      const colours = view.palette(signed, dark);
      const zero = signed ? 128 : 0;
      const at = (i) => colours.slice(4 * i, 4 * i + 3);
      const off = (i) => at(i).reduce((sum, c, k) => sum + Math.abs(c - at(zero)[k]), 0);
      assert.equal(off(zero), 0);
      for (let i = zero + 1; i < 256; i++) assert.ok(off(i) >= off(i - 1));
      if (signed) for (let i = zero - 1; i > 1; i--) assert.ok(off(i - 1) >= off(i));
      assert.ok(off(255) > 200);
    }
  }
});

test("pixels are the palette's", () => {
  const colours = view.palette(false, false);
  const pixels = view.painted(new Uint8Array([0, 255, 7]), colours);
  assert.deepEqual(Array.from(pixels.slice(4, 8)), Array.from(colours.slice(4 * 255)));
  assert.equal(pixels.length, 12);
});

test("odd tokens can be seen", () => {
  assert.equal(view.visible("\n"), "⏎");
  assert.equal(view.visible("  "), "␣␣");
  assert.equal(view.visible(""), "␣");
  assert.equal(view.visible("\u0000a\u200f"), "�a�");
  assert.equal(view.visible(" שלום"), " שלום");
  assert.equal(view.visible("👩‍🚀"), "👩�🚀"); // a joiner is a control too: what it joins stays in sight
  assert.equal(view.shortened("👩🚀👩🚀", 3), "👩🚀…");
  assert.equal(view.shortened("abc", 3), "abc");
});

test("an edit takes the place of another of its head; scale 1 is none", () => {
  const edits = [{ head: "1.0", how: "ablate" }, { head: "2.0", how: "scale", alpha: 0.5 }];
  assert.deepEqual(view.edited(edits, { head: "1.0", how: "patch" }), [edits[1], { head: "1.0", how: "patch" }]);
  assert.deepEqual(view.edited(edits, { head: "2.0", how: "scale", alpha: 1 }), [edits[0]]);
  assert.equal(view.told({ head: "2.0", how: "scale", alpha: 0.5 }), "2.0 × 0.50");
});

test("heads of the grid: by layer, one head of each layer, the chosen ones, by score", () => {
  const all = { layers: 3, heads: 2, layer: -1, column: -1, chosen: [], scores: null };
  assert.deepEqual(view.arranged(all), { rows: [[[0, 0], [0, 1]], [[1, 0], [1, 1]], [[2, 0], [2, 1]]], labelled: true });
  assert.deepEqual(view.arranged({ ...all, layer: 1 }).rows, [[[1, 0], [1, 1]]]);
  assert.deepEqual(view.arranged({ ...all, column: 1 }), { rows: [[[0, 1], [1, 1], [2, 1]]], labelled: false });
  assert.deepEqual(view.arranged({ ...all, column: -2, chosen: ["2.0", "0.1"] }).rows, [[[0, 1], [2, 0]]]);
  assert.deepEqual(view.arranged({ ...all, column: -2 }).rows, []);
  const scores = [0.1, -0.9, 0.5, null, 0, 0.2];
  const { rows } = view.arranged({ ...all, scores });
  assert.deepEqual(rows.flat(), [[0, 1], [1, 0], [2, 1], [0, 0], [1, 1], [2, 0]]);
  for (const row of rows) for (const one of row) assert.deepEqual(rows[view.placeOf(rows, one)[0]][view.placeOf(rows, one)[1]], one);
  assert.equal(view.placeOf(rows, [5, 5]), null);
});

test("numbers and bytes there and back", () => {
  for (const share of [-1, -0.5, 0, 0.25, 1]) assert.ok(Math.abs(view.fromByte(view.toByte(share, true), true, 1) - share) < 0.005);
  assert.equal(view.toByte(-3, false), 0);
  assert.equal(view.toByte(7, true), 255);
  assert.equal(view.number(-0.25), "−0.250");
  assert.equal(view.number(0), "+0.000");
  assert.equal(view.number(0.00001), "+1.0e-5");
});

test("what is toggled is added, or taken away where all of it is there", () => {
  assert.deepEqual(view.toggled(["a"], ["b", "c"]), ["a", "b", "c"]);
  assert.deepEqual(view.toggled(["a", "b"], ["b", "c"]), ["a", "b", "c"]);
  assert.deepEqual(view.toggled(["a", "b", "c"], ["b", "c"]), ["a"]);
});
