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

test("a kernel that is gone, or another one, is told; edits are not sent to it", () => {
  const shown = () => {
    const classes = new Set();
    return { dataset: {}, classes, classList: { toggle: (name, on) => (on ? classes.add(name) : classes.delete(name)) } };
  };
  for (const end of [(asking) => asking.lost(), (_, model) => (model.widget_manager.kernel = null), (_, model) => (model.widget_manager.kernel = {})]) {
    const model = Object.assign(host(), { widget_manager: { kernel: {} } });
    const asking = new Asking(model);
    const element = shown();
    asking.send(["a"]);
    asking.shownOn(element);
    assert.ok(element.classes.has("mk-running") && !element.dataset.told);
    end(asking, model);
    asking.shownOn(element);
    assert.ok(!element.classes.has("mk-running"));
    assert.match(element.dataset.told, /kernel is gone/);
    asking.send(["b"]);
    assert.deepEqual(model.sent, [["a"]]);
    assert.deepEqual(asking.edits, ["a"]);
    clearTimeout(asking.timer);
  }
});

test("a host that tells nothing of its kernel is waited for", () => {
  const asking = new Asking(host());
  asking.send(["a"]);
  assert.ok(asking.running && !asking.gone);
});
