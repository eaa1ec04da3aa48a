// Attention of every head: a grid of thumbnails by layer, one head large, tokens as text, and edits of a live model.
//
// 1. Maps come as bytes, a value a cell, heads one after the other: the grid is painted from them, a strip a layer, and
//    the head in focus as well until its exact values (half precision) arrive.
// 2. What is chosen, edited and shown is state of the model object that the host keeps (traits of the Python widget, or
//    the stand-in of an exported page). This file knows no language model: it asks for a head's values, and for what
//    edits do, by setting state.
// 3. While a run is on, later edits wait, and only the newest of them is sent.
// 4. The keyboard does what the pointer does: arrows move, Enter chooses, letters act (listed under "Keys").

import { Asking } from "./asking.js";
import { AttentionPainting } from "./attention_painting.js";
import { editControls, keyList, menu, tokenButtons } from "./controls.js";
import { answers, bytesOf, make, takenBack } from "./elements.js";
import { rendering } from "./frame.js";
import { cellAt, edited, moved, placeOf, told, visible } from "./parts.js";

const KEYS = [
  ["arrows", "move over the heads (Home, End, Page Up, Page Down to the edges)"],
  ["Space", "choose the head too, or no more"],
  ["A", "ablate what is chosen, or the head in focus"],
  ["P", "patch it from the other prompt"],
  ["- and +", "scale it down or up by a quarter"],
  ["U", "undo the last edit"],
  ["0", "undo all edits"],
  ["[ and ]", "lock the previous or next token"],
  ["Escape", "unlock the token, choose nothing"],
];

class AttentionView extends AttentionPainting {
  constructor(model, el) {
    super(model, el, "attention");
    this.hoverToken = null;
    this.asking = new Asking(model);
    this.build();
    this.watch(
      {
        "about maps": () => this.takeData(),
        map: () => this.paintAll(),
        "layer column order": () => this.paintGrid(),
        "head selection": () => this.showFocus(),
        "exact_values token": () => this.paintFocus(),
        changes: () => this.showEdits(),
        result: () => this.showResult(),
      },
      () => this.paintAll(),
    );
    this.on("comm_live_update", () => {
      this.asking.lost();
      this.asking.shownOn(this.table);
    });
    this.takeData();
  }

  build() {
    this.choices = make("div", { class: "mk-choices" });
    this.grid = make("canvas", { "aria-hidden": "true" });
    this.marks = make("canvas", { class: "mk-marks", "aria-hidden": "true" });
    this.gridBox = make(
      "div",
      { class: "mk-grid", tabindex: "0", role: "application", "aria-roledescription": "grid of attention heads" },
      make("div", { class: "mk-layers" }, this.grid, this.marks),
    );
    this.large = make("canvas", { "aria-hidden": "true" });
    this.largeBox = make("div", { class: "mk-large" }, this.large);
    this.caption = make("p", { class: "mk-caption", "aria-live": "polite" });
    this.words = make("div", { class: "mk-words", role: "group", "aria-label": "tokens of the prompt" });
    this.actions = make("div", { class: "mk-actions", role: "group", "aria-label": "edits" });
    this.list = make("ul", { class: "mk-edits", "aria-label": "active edits" });
    this.table = make("div", { class: "mk-result", "aria-live": "polite" });
    const side = make("div", { class: "mk-side" }, this.caption, this.largeBox, this.words);
    const live = make("div", { class: "mk-live" }, this.actions, this.list, this.table);
    const body = make("div", { class: "mk-body" }, this.gridBox, side, live);
    this.root.append(this.choices, body, keyList(KEYS));
    this.gridBox.addEventListener("keydown", (event) => this.keyed(event));
    this.grid.addEventListener("click", (event) => this.clicked(event));
    this.grid.addEventListener("pointermove", (event) => this.pointed(event));
    this.grid.addEventListener("pointerleave", () => this.tip(null));
    this.large.addEventListener("pointermove", (event) => this.pointedLarge(event));
    this.large.addEventListener("pointerleave", () => {
      this.tip(null);
      this.overToken(null);
    });
  }

  // -- data ---------------------------------------------------------------------------------------------------

  takeData() {
    const { title, tokens, live } = this.about;
    this.title.textContent = title;
    this.bytes = bytesOf(this.model.get("maps"));
    this.root.classList.toggle("mk-static", !live);
    this.gridBox.setAttribute("aria-label", `${title}: heads by layer. Arrows move, Enter chooses.`);
    const told = { over: (i) => this.overToken(i), lock: (i) => this.lock(this.locked === i ? null : i) };
    this.words.replaceChildren(...tokenButtons(tokens.map(visible), told));
    this.buildChoices();
    this.buildActions();
    this.showEdits();
    this.showResult();
  }

  buildChoices() {
    const { maps, layers, heads, scores } = this.about;
    const names = maps.map(({ name }) => [name, name]);
    const each = (count, what) => Array.from({ length: count }, (_, i) => [i, `${what} ${i}`]);
    const orders = [["layer", "by layer"], ...(scores ? [["score", `by ${scores.unit}`]] : [])];
    const numbered = (name) => (value) => this.set({ [name]: Number(value) });
    this.menus = {
      map: menu("Map", "map", names, (map) => this.set({ map })),
      layer: menu("Layers", "layers", [[-1, "every layer"], ...each(layers, "layer")], numbered("layer")),
      column: menu("Heads", "heads", [[-1, "every head"], ...each(heads, "head"), [-2, "chosen ones"]], numbered("column")),
      order: menu("Order", "order", orders, (order) => this.set({ order })),
    };
    const shown = Object.entries(this.menus).filter(([name]) => name !== "order" || scores);
    this.choices.replaceChildren(...shown.map(([, one]) => one.element));
  }

  buildActions() {
    if (!this.about.live) return;
    const actions = { edit: (...how) => this.edit(...how), undo: () => this.undo(), clear: () => this.ask([]) };
    const { elements, slider } = editControls(this.about.compare, actions);
    this.slider = slider;
    this.actions.replaceChildren(...elements);
  }

  // -- what is in focus, and what is chosen ---------------------------------------------------------------------

  showFocus() {
    const name = this.model.get("head");
    const { scores } = this.about;
    const [layer, head] = this.focused;
    const value = scores ? scores.values[layer * this.about.heads + head] : null;
    const chosen = this.model.get("selection");
    const score = value === null ? "" : `, ${scores.unit} ${value.toFixed(3)}`;
    const others = chosen.length ? ` Chosen: ${chosen.join(" ")}.` : "";
    this.caption.textContent = `Head ${name}${score}.${others}`;
    const alpha = this.asking.edits.find((edit) => edit.head === name && edit.how === "scale")?.alpha ?? 1;
    if (this.slider) this.slider.value = String(alpha);
    this.paintAll();
  }

  focus(layer, head) {
    if (`${layer}.${head}` !== this.model.get("head")) this.set({ head: `${layer}.${head}` });
  }

  lock(token) {
    this.set({ token: token ?? -1 });
  }

  overToken(token) {
    this.hoverToken = token;
    this.paintFocus();
  }

  // -- pointer and keys -------------------------------------------------------------------------------------

  at(event) {
    const { rows } = this.rows;
    const found = cellAt(this.layout, rows.length, rows[0]?.length ?? 0, event.offsetX, event.offsetY);
    return found && (rows[found[0]][found[1]] ?? null);
  }

  clicked(event) {
    const found = this.at(event);
    if (!found) return;
    this.focus(...found);
    if (event.shiftKey || event.ctrlKey || event.metaKey) this.choose(found.join("."));
  }

  pointed(event) {
    const found = this.at(event);
    if (!found) return this.tip(null);
    const { scores, heads } = this.about;
    const value = scores ? scores.values[found[0] * heads + found[1]] : null;
    this.tip(`head ${found.join(".")}${value === null ? "" : `: ${value.toFixed(3)}`}`, event);
  }

  pointedLarge(event) {
    const { tokens } = this.about;
    const { margin, side } = this.largeLayout;
    const [row, column] = [event.offsetY, event.offsetX - margin].map((at) =>
      Math.min(tokens.length - 1, Math.max(0, Math.floor((at * tokens.length) / side))),
    );
    const value = this.values[row * tokens.length + column];
    this.tip(`${visible(tokens[row])} → ${visible(tokens[column])}: ${value.toFixed(this.figures)}`, event);
    if (this.hoverToken !== row) this.overToken(row);
  }

  keyed(event) {
    const { rows } = this.rows;
    const [row, column] = placeOf(rows, this.focused) ?? [0, 0];
    const next = moved(event.key, row, column, rows.length, rows[row]?.length ?? 0);
    const { tokens, live } = this.about;
    const alpha = this.asking.edits.find(({ head, how }) => head === this.model.get("head") && how === "scale")?.alpha ?? 1;
    const choose = () => this.choose(this.model.get("head"));
    const louder = () => this.edit("scale", Math.min(2, alpha + 0.25));
    this.pressed(event, {
      " ": choose,
      Enter: choose,
      "[": () => this.lock(Math.max(0, (this.locked ?? tokens.length) - 1)),
      "]": () => this.lock(Math.min(tokens.length - 1, (this.locked ?? -1) + 1)),
      Escape: () => this.set({ selection: [], token: -1 }),
      ...(live && {
        a: () => this.edit("ablate"),
        p: () => this.about.compare && this.edit("patch"),
        "-": () => this.edit("scale", Math.max(-1, alpha - 0.25)),
        "+": louder,
        "=": louder,
        u: () => this.undo(),
        0: () => this.ask([]),
      }),
      ...(next && {
        [event.key]: () => {
          this.focus(...(rows[next[0]][next[1]] ?? rows[next[0]].at(-1)));
          this.reveal();
        },
      }),
    });
  }

  // -- edits ------------------------------------------------------------------------------------------------

  edit(how, alpha) {
    const chosen = this.model.get("selection");
    const heads = chosen.length ? chosen : [this.model.get("head")];
    const one = (head) => (how === "scale" ? { head, how, alpha } : { head, how });
    this.ask(heads.reduce((edits, head) => edited(edits, one(head)), this.asking.edits));
  }

  undo() {
    this.ask(this.asking.edits.slice(0, -1));
  }

  ask(edits) {
    this.asking.send(edits);
    this.asking.shownOn(this.table);
    this.showEdits();
  }

  showEdits() {
    const without = (edit) => this.ask(this.asking.edits.filter((one) => one.head !== edit.head));
    this.list.replaceChildren(...takenBack(this.asking.edits, told, without));
    this.showFocus();
  }

  showResult() {
    const sent = this.asking.goOn();
    this.asking.shownOn(this.table);
    if (!sent) this.table.replaceChildren(...answers(this.model.get("result") ?? {}));
  }
}

export default rendering(AttentionView);
