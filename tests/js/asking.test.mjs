// Edits on their way to the kernel.
import assert from "node:assert/strict";
import test from "node:test";

import { Asking } from "../../mechkit/view/static/asking.js";

function host() {
  const state = { changes: [], asked: 0, result: { answered: 0 } };
  const sent = [];
  return {
    sent,
    get: (name) => state[name],
    set: (name, value) => (state[name] = value),
    save_changes: () => sent.push(state.changes),
    answer: () => (state.result = { answered: state.asked }),
  };
}

test("while a run is on, edits wait, build on each other, and only the newest are sent", () => {
  const model = host();
  const asking = new Asking(model);
  asking.send(["a"]);
  assert.ok(asking.running);
  asking.send([...asking.edits, "b"]);
  asking.send([...asking.edits, "c"]);
  assert.deepEqual(model.sent, [["a"]]);
  assert.deepEqual(asking.edits, ["a", "b", "c"]);
  assert.equal(asking.goOn(), false); // no answer yet
  model.answer();
  assert.equal(asking.goOn(), true);
  assert.deepEqual(model.sent, [["a"], ["a", "b", "c"]]);
  model.answer();
  assert.equal(asking.goOn(), false);
  assert.ok(!asking.running);
  asking.send([]);
  assert.deepEqual(model.sent[2], []);
});

test("a kernel that does not answer for a minute does not block", () => {
  const model = host();
  const asking = new Asking(model);
  asking.send(["a"]);
  asking.started = performance.now() - 61_000;
  assert.ok(!asking.running);
  asking.send(["b"]);
  assert.deepEqual(model.sent, [["a"], ["b"]]);
});
