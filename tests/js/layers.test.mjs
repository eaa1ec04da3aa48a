// Where the parts of a circuit stand: node --test tests/js
import assert from "node:assert/strict";
import test from "node:test";

import { along, boxAt, curveOf, grouped, layered, lineAt, lines, towards } from "../../mechkit/view/static/layers.js";

const node = (site, kind, layer, column, score, order) => ({ site, kind, layer, column, score, order, head: Number(site.split(".")[1] ?? 0) });
const NODES = [
  node("embed", "embed", -1, 0, null, 0),
  node("1.0", "z", 1, 0, 0.2, 1),
  node("1.3", "z", 1, 0, -0.5, 2),
  node("m1", "mlp", 1, 1, 0.1, 3),
  node("4.2", "z", 4, 2, 0.9, 0),
  node("logits", "logits", -1, 2, null, 0),
];
const edge = (source, reader, slot, score) => ({ edge: `${source}->${reader}.${slot}`, source, readers: [reader], slot, score, order: 0 });
const EDGES = [edge("1.0", "4.2", "q", 0.3), edge("1.3", "4.2", "q", -0.1), edge("1.0", "4.2", "v", 0.2), edge("4.2", "logits", "logits", 1)];
const COLUMNS = ["IO", "S2", "END"];

test("layers stand from bottom to top, an MLP above its heads, and no two boxes touch", () => {
  const { boxes, rows, width, height } = layered(grouped(NODES, []), COLUMNS, 500);
  const order = ["embed", "1.0", "m1", "4.2", "logits"];
  for (let i = 1; i < order.length; i++) assert.ok(boxes[order[i]].y < boxes[order[i - 1]].y, order[i]);
  assert.equal(boxes["1.0"].y, boxes["1.3"].y);
  assert.deepEqual(rows.map((row) => row.text), ["embed", "layer 1", "MLP 1", "layer 4", "logits"]);
  const all = Object.values(boxes);
  for (const one of all) {
    assert.ok(one.x - one.wide / 2 >= 0 && one.x + one.wide / 2 <= width && one.y > 0 && one.y < height);
    for (const other of all) {
      if (one === other) continue;
      const apart = Math.abs(one.x - other.x) >= (one.wide + other.wide) / 2 || Math.abs(one.y - other.y) >= one.high;
      assert.ok(apart);
    }
  }
  assert.ok(boxes["4.2"].x > boxes["m1"].x && boxes["m1"].x > boxes["1.0"].x);
});

test("many parts in one cell still have room each", () => {
  const many = Array.from({ length: 30 }, (_, i) => node(`0.${i}`, "z", 0, 0, 1, i));
  const { boxes, width } = layered(grouped(many, []), ["all"], 300);
  const xs = Object.values(boxes).map((box) => box.x).sort((a, b) => a - b);
  for (let i = 1; i < xs.length; i++) assert.ok(xs[i] - xs[i - 1] >= 46);
  assert.ok(width > 30 * 46);
});

test("a group is one part where its largest member stands, and its scores are added", () => {
  const parts = grouped(NODES, [{ name: "early", sites: ["1.0", "1.3"] }]);
  const early = parts.find((part) => part.name === "early");
  assert.ok(Math.abs(early.score - -0.3) < 1e-12);
  assert.deepEqual(early.sites, ["1.0", "1.3"]);
  assert.equal(early.column, 0);
  assert.equal(parts.length, NODES.length - 1);
  const found = lines(parts, EDGES);
  const query = found.find((line) => line.from === "early" && line.slot === "q");
  assert.ok(Math.abs(query.score - 0.2) < 1e-12);
  assert.deepEqual(query.edges, ["1.0->4.2.q", "1.3->4.2.q"]);
  assert.equal(found.length, 3);
  assert.equal(grouped(NODES, [{ name: "gone", sites: ["9.9"] }]).length, NODES.length);
});

test("lines inside a group, and to what is not shown, are not drawn", () => {
  const parts = grouped(NODES, [{ name: "both", sites: ["1.0", "4.2"] }]);
  assert.deepEqual(lines(parts, EDGES).map(({ from, to }) => [from, to]), [["1.3", "both"], ["both", "logits"]]);
  assert.equal(lines(parts, [edge("7.7", "4.2", "q", 1)]).length, 0);
});

test("a point on a line finds it, a point in a box finds the box, a point far away finds nothing", () => {
  const parts = grouped(NODES, []);
  const all = lines(parts, EDGES);
  const { boxes } = layered(parts, COLUMNS, 500);
  for (const line of all) {
    const middle = along(curveOf(boxes, line), 0.5);
    const found = lineAt(boxes, all, middle.x + 1, middle.y);
    assert.ok(found && found.from === line.from && found.to === line.to);
  }
  for (const [name, { x, y }] of Object.entries(boxes)) assert.equal(boxAt(boxes, x, y), name);
  assert.equal(boxAt(boxes, -50, -50), null);
  assert.equal(lineAt(boxes, all, -50, -50), null);
});

test("every part is reached by arrow keys from every other", () => {
  const { boxes } = layered(grouped(NODES, []), COLUMNS, 500);
  const keys = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"];
  for (const start of Object.keys(boxes)) {
    const seen = new Set([start]);
    const queue = [start];
    while (queue.length) {
      const at = queue.pop();
      for (const key of keys) {
        const next = towards(boxes, at, key);
        if (next && !seen.has(next)) {
          seen.add(next);
          queue.push(next);
        }
      }
    }
    assert.equal(seen.size, NODES.length, start);
  }
  assert.equal(towards(boxes, "logits", "ArrowUp"), null);
  assert.equal(towards(boxes, "logits", "x"), null);
});

test("an edge that several parts of a group read counts once", () => {
  const parts = grouped(NODES, [{ name: "pair", sites: ["1.0", "1.3"] }]);
  const shared = { edge: "embed->1.kv0.k", source: "embed", readers: ["1.0", "1.3"], slot: "k", score: 0.3, order: 0 };
  const [line] = lines(parts, [shared]);
  assert.deepEqual([line.score, line.edges], [0.3, ["embed->1.kv0.k"]]);
  assert.equal(lines(grouped(NODES, []), [shared]).length, 2);
});
