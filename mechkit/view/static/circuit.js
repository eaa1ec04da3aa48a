// A circuit as layers of parts with lines between them: cut lines or parts, make it smaller, and see its faithfulness.
//
// 1. `changes` is how much of the circuit is left in, its first `size` members, and what of that is cut. The host measures
//    what that does (see asking.js); a page without a kernel knows the curve over sizes, and shows that.
// 2. Parts can be put into groups (supernodes), which are drawn as one: their scores, and those of lines between the
//    same two, are added.
// 3. The keyboard does what the pointer does: arrows go from part to part, [ and ] over the lines of a part.

import { Asking } from "./asking.js";
import { circuitControls, keyList } from "./controls.js";
import { paintCircuit, paintCurve } from "./drawing.js";
import { faithfulnessTold, make, takenBack } from "./elements.js";
import { Frame, rendering, reveal } from "./frame.js";
import { boxAt, grouped, layered, lineAt, lines, towards } from "./layers.js";
import { number, toggled } from "./parts.js";

const KEYS = [
  ["arrows", "go from part to part"],
  ["[ and ]", "go over the lines of the part in focus"],
  ["Space", "choose the part, or no more"],
  ["X", "cut the line in focus, or else the part, or put it back"],
  ["- and +", "one member less or more"],
  ["G", "make a group of what is chosen; on a group: dissolve it"],
  ["U", "put back what was cut last"],
  ["0", "put back everything"],
  ["Escape", "leave the line, choose nothing"],
];

class CircuitView extends Frame {
  constructor(model, el) {
    super(model, el, "circuit");
    this.asking = new Asking(model);
    this.line = null;
    this.build();
    this.watch(
      {
        about: () => this.takeData(),
        "site selection groups": () => this.paint(),
        changes: () => this.showChanges(),
        result: () => this.showResult(),
      },
      () => this.paint(),
    );
    this.on("comm_live_update", () => {
      this.asking.lost();
      this.asking.shownOn(this.answer);
    });
    this.takeData();
  }

  build() {
    this.drawing = make("canvas", { "aria-hidden": "true" });
    const role = { tabindex: "0", role: "application", "aria-roledescription": "graph of a circuit" };
    this.box = make("div", { class: "mk-map", ...role }, this.drawing);
    this.caption = make("p", { class: "mk-caption", "aria-live": "polite" });
    this.note = make("p", { class: "mk-note" });
    const { elements, slider, name } = circuitControls({
      size: (size) => this.ask({ size }),
      cut: () => this.cut(),
      undo: () => this.ask({ cuts: this.asking.edits.cuts.slice(0, -1) }),
      clear: () => this.ask({ cuts: [] }),
      group: () => this.group(),
    });
    Object.assign(this, { slider, name });
    this.list = make("ul", { class: "mk-edits", "aria-label": "what is cut" });
    this.curve = make("canvas", { "aria-hidden": "true" });
    this.answer = make("div", { class: "mk-result", "aria-live": "polite" });
    const left = make("div", {}, this.box, this.caption, this.note);
    this.side = make("div", { class: "mk-live" }, make("div", { class: "mk-actions" }, ...elements), this.list, this.answer, this.curve);
    this.root.append(make("div", { class: "mk-pair mk-wide" }, left, this.side), keyList(KEYS));
    this.box.addEventListener("keydown", (event) => this.keyed(event));
    this.drawing.addEventListener("click", (event) => this.clicked(event));
    this.drawing.addEventListener("pointermove", (event) => this.pointed(event));
    this.drawing.addEventListener("pointerleave", () => this.tip(null));
  }

  takeData() {
    const { title, total, columns_by, edges_by } = this.about;
    this.title.textContent = title;
    this.slider.max = String(total);
    this.box.setAttribute("aria-label", `${title}. Arrows go from part to part.`);
    this.note.textContent = [columns_by, edges_by, "Blue, full lines: for the answer; orange, dashed: against it."].filter(Boolean).join(" ");
    this.measured = JSON.stringify(this.model.get("changes")); // what the result that came with the data is of
    this.showChanges();
    this.showResult();
  }

  get changes() {
    return this.asking.edits;
  }

  /** Parts and lines of what is left in, and where they stand. */
  arrange() {
    const { nodes, edges, columns } = this.about;
    const { size } = this.changes;
    const within = ({ order, kind }) => order < size || kind === "embed" || kind === "logits";
    this.parts = grouped(nodes.filter(within), this.model.get("groups"));
    this.lines = lines(this.parts, edges.filter(within));
    this.layout = layered(this.parts, columns, this.box.parentElement.clientWidth || 600);
    this.focus = this.parts.find((part) => part.sites.includes(this.model.get("site"))) ?? this.parts[0];
    const same = (line) => this.line && line.from === this.line.from && line.to === this.line.to && line.slot === this.line.slot;
    this.line = this.lines.find(same) ?? null;
  }

  paint() {
    this.arrange();
    const cuts = new Set(this.changes.cuts);
    const probe = getComputedStyle(this.root).getPropertyValue("--jp-layout-color0").trim();
    paintCircuit(this.drawing, {
      layout: this.layout,
      parts: this.parts,
      lines: this.lines,
      columns: this.about.columns,
      ink: this.ink,
      dark: this.dark,
      paper: probe || (this.dark ? "#16181d" : "#ffffff"),
      selected: new Set(this.model.get("selection")),
      focus: this.focus?.name,
      line: this.line,
      cuts,
    });
    this.showFocus();
    this.paintCurve();
  }

  paintCurve() {
    const { curve } = this.about;
    const { size, cuts } = this.changes;
    this.curve.hidden = curve.length === 0;
    if (!curve.length) return;
    const fresh = this.about.live ? !this.asking.running : JSON.stringify(this.changes) === this.measured;
    const { faithfulness } = (fresh && this.model.get("result")) || {};
    const now = faithfulness ?? (cuts.length ? null : this.known(size));
    paintCurve(this.curve, { width: Math.min(320, this.side.clientWidth || 280), points: curve, size, now, ink: this.ink, dark: this.dark });
  }

  /** Faithfulness of the first members, where it is on the curve, or null. */
  known(size) {
    return this.about.curve.find((one) => one.size === size)?.faithfulness ?? null;
  }

  showFocus() {
    const chosen = this.model.get("selection");
    const others = chosen.length ? ` Chosen: ${chosen.join(" ")}.` : "";
    const told = this.line ? this.toldLine(this.line) : this.focus ? this.toldPart(this.focus) : "";
    this.caption.textContent = `${told}.${others}`;
  }

  toldPart({ name, sites, score, se, group }) {
    const members = group ? ` (${sites.join(" ")})` : "";
    const error = se && !group ? ` ± ${number(se).slice(1)}` : "";
    return `${name}${members}${score === null ? "" : `: ${number(score)}${error} ${this.about.unit}`}`;
  }

  toldLine({ from, to, slot, score, edges }) {
    const several = edges.length > 1 ? `, ${edges.length} edges` : "";
    return `${from} → ${to}${["q", "k", "v"].includes(slot) ? ` (${slot})` : ""}: ${number(score)}${several}`;
  }

  showChanges() {
    const { size, cuts } = this.changes;
    this.slider.value = String(size);
    this.slider.setAttribute("aria-valuetext", `${size} of ${this.about.total}`);
    this.slider.nextElementSibling.textContent = `${size} of ${this.about.total}`;
    this.list.replaceChildren(...takenBack(cuts, (cut) => `${cut.replace("->", " → ")} cut`, (cut) => this.ask({ cuts: this.asking.edits.cuts.filter((one) => one !== cut) })));
    this.paint();
    if (!this.about.live) this.showResult();
  }

  showResult() {
    const { live, curve } = this.about;
    const { size, cuts } = this.changes;
    const sent = live && this.asking.goOn();
    if (live) this.asking.shownOn(this.answer);
    if (sent) return;
    const told = live || JSON.stringify(this.changes) === this.measured ? (this.model.get("result") ?? {}) : {};
    const result = told.faithfulness === undefined && !live && !cuts.length ? { faithfulness: this.known(size) ?? undefined } : told;
    this.answer.replaceChildren(...faithfulnessTold(result, curve.at(-1)?.faithfulness));
    if (!live && curve.length && result.faithfulness === undefined) this.answer.textContent = "Not measured: that needs the model.";
    this.paintCurve();
  }

  // -- what is done to it -------------------------------------------------------------------------------------

  ask(some) {
    const next = { ...this.changes, ...some };
    if (!this.about.live) return this.set({ changes: next });
    this.asking.send(next);
    this.asking.shownOn(this.answer);
    this.showChanges();
  }

  cut() {
    const what = this.line ? this.line.edges : this.focus?.sites.filter((site) => site !== "embed" && site !== "logits");
    if (what?.length) this.ask({ cuts: toggled(this.asking.edits.cuts, what) });
  }

  group() {
    const groups = this.model.get("groups");
    if (this.focus?.group) {
      this.set({ groups: groups.filter(({ name }) => name !== this.focus.name), selection: this.focus.sites });
      return;
    }
    const sites = this.model.get("selection").filter((site) => !groups.some((group) => group.sites.includes(site)));
    const names = new Set([...groups.map(({ name }) => name), ...this.about.nodes.map(({ site }) => site)]);
    let name = this.name.value.trim() || `group ${groups.length + 1}`;
    while (names.has(name)) name += "′";
    if (!sites.length) {
      this.caption.textContent = "Choose parts first (Space, or a click with Shift), then make a group of them.";
      return;
    }
    this.name.value = "";
    this.set({ groups: [...groups, { name, sites }], site: sites[0], selection: [] });
    this.box.focus();
  }

  goTo(name) {
    const part = this.parts.find((one) => one.name === name);
    if (!part) return;
    this.line = null;
    this.set({ site: part.sites[0] });
    this.paint();
    const { x, y, wide, high } = this.layout.boxes[name];
    reveal(this.box, x - wide, y - high, 2 * wide, 2 * high);
  }

  /** Go over the lines of the part in focus, in order of size. */
  step(by) {
    const mine = this.lines.filter(({ from, to }) => [from, to].includes(this.focus?.name));
    mine.sort((one, other) => Math.abs(other.score) - Math.abs(one.score));
    if (!mine.length) return;
    const at = this.line ? mine.indexOf(this.line) + by : by > 0 ? 0 : mine.length - 1;
    this.line = mine[(at + mine.length) % mine.length];
    this.paint();
  }

  chooseFocus() {
    const chosen = this.model.get("selection");
    this.set({ selection: toggled(chosen, this.focus?.sites ?? []) });
  }

  // -- pointer and keys ---------------------------------------------------------------------------------------

  at({ offsetX, offsetY }) {
    const part = this.parts.find((one) => one.name === boxAt(this.layout.boxes, offsetX, offsetY));
    return { part, line: part ? null : lineAt(this.layout.boxes, this.lines, offsetX, offsetY) };
  }

  clicked(event) {
    const { part, line } = this.at(event);
    if (part) {
      this.goTo(part.name);
      if (event.shiftKey || event.ctrlKey || event.metaKey) this.chooseFocus();
      return;
    }
    this.line = line;
    this.paint();
  }

  pointed(event) {
    const { part, line } = this.at(event);
    this.tip(part ? this.toldPart(part) : line ? this.toldLine(line) : null, event);
  }

  keyed(event) {
    const next = towards(this.layout.boxes, this.focus?.name, event.key);
    const choose = () => this.chooseFocus();
    const more = (by) => this.ask({ size: Math.max(0, Math.min(this.about.total, this.changes.size + by)) });
    this.pressed(event, {
      " ": choose,
      Enter: choose,
      "[": () => this.step(-1),
      "]": () => this.step(1),
      x: () => this.cut(),
      "-": () => more(-1),
      "+": () => more(1),
      "=": () => more(1),
      g: () => this.group(),
      u: () => this.ask({ cuts: this.asking.edits.cuts.slice(0, -1) }),
      0: () => this.ask({ cuts: [] }),
      Escape: () => {
        this.line = null;
        this.set({ selection: [] });
        this.paint();
      },
      ...(event.key.startsWith("Arrow") && { [event.key]: () => next && this.goTo(next) }),
    });
  }
}

export default rendering(CircuitView);
