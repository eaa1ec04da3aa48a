// Attention of every head: a grid of thumbnails by layer, one head large, tokens as text, and edits of a live model.
//
// 1. Maps come as bytes, a value a cell, heads one after the other: the grid is painted from them, a strip a layer, and
//    the head in focus as well until its exact values (half precision) arrive.
// 2. What is chosen, edited and shown is state of the model object that the host keeps (traits of the Python widget, or
//    the stand-in of an exported page). This file knows no language model: it asks for a head's values, and for what
//    edits do, by setting state.
// 3. While a run is on, later edits wait, and only the newest of them is sent.
// 4. The keyboard does what the pointer does: arrows move, Enter chooses, letters act (listed under "?").

import { Asking } from "./asking.js";
import { editControls, keyList, menu, tokenButtons } from "./controls.js";
import { answers, bytesOf, editList, isDark, make } from "./elements.js";
import { mapLayout, paintGrid, paintMap } from "./painting.js";
import { cellAt, edited, fromByte, fromHalf, gridLayout, moved, palette, visible } from "./parts.js";

class View {
  constructor(model, el) {
    this.model = model;
    this.el = el;
    this.lockedToken = null;
    this.hoverToken = null;
    this.asking = new Asking(model);
    this.build();
    this.listeners = [];
    const on = (names, action) => {
      for (const name of names) {
        model.on(`change:${name}`, action);
        this.listeners.push([`change:${name}`, action]);
      }
    };
    on(["about", "maps"], () => this.takeData());
    on(["map"], () => this.paintAll());
    on(["layer"], () => this.paintGrid());
    on(["head", "selection"], () => this.showFocus());
    on(["exact_values"], () => this.paintFocus());
    on(["changes"], () => this.showEdits());
    on(["result"], () => this.showResult());
    this.resized = new ResizeObserver(() => this.paintAll());
    this.resized.observe(el);
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.rethemed = () => this.paintAll();
    this.theme.addEventListener("change", this.rethemed);
    this.watched = new MutationObserver(this.rethemed);
    this.watched.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.takeData();
  }

  remove() {
    this.resized.disconnect();
    this.watched.disconnect();
    this.theme.removeEventListener("change", this.rethemed);
    for (const [name, action] of this.listeners) this.model.off(name, action);
  }

  get about() {
    return this.model.get("about");
  }

  get focused() {
    const [layer, head] = this.model.get("head").split(".").map(Number);
    return [layer, head];
  }

  set(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
  }

  build() {
    this.title = make("h3", { class: "mk-title" });
    this.choices = make("div", { class: "mk-choices" });
    this.grid = make("canvas", { "aria-hidden": "true" });
    this.gridBox = make(
      "div",
      { class: "mk-grid", tabindex: "0", role: "application", "aria-roledescription": "grid of attention heads" },
      this.grid,
    );
    this.large = make("canvas", { "aria-hidden": "true" });
    this.largeBox = make("div", { class: "mk-large" }, this.large);
    this.caption = make("p", { class: "mk-caption", "aria-live": "polite" });
    this.words = make("div", { class: "mk-words", role: "group", "aria-label": "tokens of the prompt" });
    this.actions = make("div", { class: "mk-actions", role: "group", "aria-label": "edits" });
    this.list = make("ul", { class: "mk-edits", "aria-label": "active edits" });
    this.table = make("div", { class: "mk-result", "aria-live": "polite" });
    this.help = keyList();
    const side = make("div", { class: "mk-side" }, this.caption, this.largeBox, this.words);
    const live = make("div", { class: "mk-live" }, this.actions, this.list, this.table);
    const body = make("div", { class: "mk-body" }, this.gridBox, side, live);
    this.root = make("section", { class: "mk-attention" }, this.title, this.choices, body, this.help);
    this.el.append(this.root);
    this.gridBox.addEventListener("keydown", (event) => this.keyed(event));
    this.grid.addEventListener("click", (event) => this.clicked(event));
    this.grid.addEventListener("pointermove", (event) => this.pointed(event));
    this.grid.addEventListener("pointerleave", () => this.tip(null));
    this.large.addEventListener("pointermove", (event) => this.pointedLarge(event));
    this.large.addEventListener("pointerleave", () => this.tip(null));
    this.hint = make("div", { class: "mk-tip", hidden: true });
    this.root.append(this.hint);
  }

  // -- data ---------------------------------------------------------------------------------------------------

  takeData() {
    const { title, tokens, live } = this.about;
    this.title.textContent = title;
    this.bytes = bytesOf(this.model.get("maps"));
    this.root.classList.toggle("mk-static", !live);
    this.gridBox.setAttribute("aria-label", `${title}: heads by layer. Arrows move, Enter chooses.`);
    const told = { over: (i) => this.overToken(i), lock: (i) => this.lock(this.lockedToken === i ? null : i) };
    this.words.replaceChildren(...tokenButtons(tokens.map(visible), told));
    this.buildChoices();
    this.buildActions();
    this.showEdits();
    this.showResult();
  }

  buildChoices() {
    const { maps, layers } = this.about;
    const names = maps.map(({ name }) => [name, name]);
    const each = Array.from({ length: layers }, (_, i) => [i, `layer ${i}`]);
    this.mapChoice = menu("Map", "map", names, (map) => this.set({ map }));
    this.layerChoice = menu("Show", "layer", [[-1, "every layer"], ...each], (i) => this.set({ layer: Number(i) }));
    this.choices.replaceChildren(this.mapChoice.element, this.layerChoice.element);
  }

  buildActions() {
    if (!this.about.live) return;
    const actions = { edit: (...how) => this.edit(...how), undo: () => this.undo(), clear: () => this.ask([]) };
    const { elements, slider } = editControls(this.about.compare, actions);
    this.slider = slider;
    this.actions.replaceChildren(...elements);
  }

  mapIndex() {
    return Math.max(0, this.about.maps.findIndex((one) => one.name === this.model.get("map")));
  }

  /** The exact values of the head in focus where they have arrived, else those of its bytes. */
  focusValues() {
    const [layer, head] = this.focused;
    const { signed, limit, name } = this.about.maps[this.mapIndex()];
    if (this.model.get("exact_of") === `${name}|${layer}.${head}`) {
      const bytes = bytesOf(this.model.get("exact_values"));
      return fromHalf(new Uint16Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)));
    }
    const { layers, heads, tokens } = this.about;
    const size = tokens.length ** 2;
    const start = ((this.mapIndex() * layers + layer) * heads + head) * size;
    return Float32Array.from(this.bytes.subarray(start, start + size), (byte) => fromByte(byte, signed, limit));
  }

  // -- painting -----------------------------------------------------------------------------------------------

  rows() {
    const layer = this.model.get("layer");
    return layer >= 0 ? [layer] : Array.from({ length: this.about.layers }, (_, i) => i);
  }

  paintAll() {
    this.paintGrid();
    this.paintFocus();
  }

  paintGrid() {
    const { heads, layers, tokens, maps, scores } = this.about;
    const map = this.mapIndex();
    const shown = this.rows();
    const size = heads * tokens.length ** 2;
    const wide = this.root.clientWidth || 900;
    this.layout = gridLayout(wide < 720 ? wide : 0.42 * wide, 620, shown.length, heads);
    this.mapChoice.select.value = maps[map].name;
    this.layerChoice.select.value = String(this.model.get("layer"));
    paintGrid(this.grid, {
      layout: this.layout,
      layers: shown,
      heads,
      n: tokens.length,
      strip: (layer) => this.bytes.subarray((map * layers + layer) * size, (map * layers + layer + 1) * size),
      colours: palette(maps[map].signed, isDark(this.el)),
      ink: getComputedStyle(this.root).color,
      scores: scores?.values,
      selected: new Set(this.model.get("selection")),
      changed: new Set(this.model.get("changes").map((edit) => edit.head)),
      focused: this.focused,
    });
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
      colours: palette(signed, isDark(this.el)),
      ink: getComputedStyle(this.root).color,
      row: this.hoverToken ?? this.lockedToken,
    });
    this.paintWords();
  }

  paintWords() {
    const { tokens, maps } = this.about;
    const row = this.hoverToken ?? this.lockedToken;
    const limit = maps[this.mapIndex()].limit || 1;
    Array.from(this.words.children).forEach((word, i) => {
      const seen = row !== null && i <= row;
      const value = seen ? this.values[row * tokens.length + i] : 0;
      const colour = value < 0 ? "230,159,0" : "0,114,178";
      word.style.background = value ? `rgba(${colour},${Math.min(0.6, (0.6 * Math.abs(value)) / limit)})` : "";
      word.classList.toggle("mk-from", i === row);
      word.setAttribute("aria-pressed", String(i === this.lockedToken));
      word.title = seen ? `${visible(tokens[i])}: ${value.toFixed(3)}` : visible(tokens[i]);
    });
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
    const alpha = this.model.get("changes").find((edit) => edit.head === name && edit.how === "scale")?.alpha ?? 1;
    if (this.slider) this.slider.value = String(alpha);
    this.paintAll();
  }

  focus(layer, head) {
    if (`${layer}.${head}` !== this.model.get("head")) this.set({ head: `${layer}.${head}` });
  }

  choose(name) {
    const chosen = this.model.get("selection");
    this.set({ selection: chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name] });
  }

  lock(token) {
    this.lockedToken = token;
    this.paintFocus();
  }

  overToken(token) {
    this.hoverToken = token;
    this.paintFocus();
  }

  // -- pointer and keys -------------------------------------------------------------------------------------

  at(event) {
    const found = cellAt(this.layout, this.rows().length, this.about.heads, event.offsetX, event.offsetY);
    return found && [this.rows()[found[0]], found[1]];
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
    this.tip(`${visible(tokens[row])} → ${visible(tokens[column])}: ${value.toFixed(3)}`, event);
    if (this.hoverToken !== row) this.overToken(row);
  }

  tip(text, event) {
    this.hint.hidden = text === null;
    if (text === null) {
      if (this.hoverToken !== null && !this.words.contains(document.activeElement)) this.overToken(null);
      return;
    }
    const box = this.root.getBoundingClientRect();
    this.hint.textContent = text;
    this.hint.style.left = `${Math.min(event.clientX - box.left + 12, box.width - 150)}px`;
    this.hint.style.top = `${event.clientY - box.top + 14}px`;
  }

  keyed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const rows = this.rows();
    const [layer, head] = this.focused;
    const next = moved(event.key, Math.max(0, rows.indexOf(layer)), head, rows.length, this.about.heads);
    const { tokens, live } = this.about;
    const alpha = Number(this.slider?.value ?? 1);
    const actions = {
      " ": () => this.choose(`${layer}.${head}`),
      Enter: () => this.choose(`${layer}.${head}`),
      "[": () => this.lock(Math.max(0, (this.lockedToken ?? tokens.length) - 1)),
      "]": () => this.lock(Math.min(tokens.length - 1, (this.lockedToken ?? -1) + 1)),
      Escape: () => {
        this.lock(null);
        this.set({ selection: [] });
      },
      ...(live && {
        a: () => this.edit("ablate"),
        p: () => this.about.compare && this.edit("patch"),
        "-": () => this.edit("scale", Math.max(-1, alpha - 0.25)),
        "+": () => this.edit("scale", Math.min(2, alpha + 0.25)),
        "=": () => this.edit("scale", Math.min(2, alpha + 0.25)),
        u: () => this.undo(),
        0: () => this.ask([]),
      }),
    };
    const action = next ? () => this.focus(rows[next[0]], next[1]) : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    event.stopPropagation(); // the notebook has keys of its own
    action();
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
  }

  showEdits() {
    const without = (edit) => this.ask(this.asking.edits.filter((one) => one.head !== edit.head));
    this.list.replaceChildren(...editList(this.model.get("changes"), without));
    this.showFocus();
  }

  showResult() {
    const sent = this.asking.goOn();
    this.asking.shownOn(this.table);
    if (!sent) this.table.replaceChildren(...answers(this.model.get("result") ?? {}));
  }
}

export function render({ model, el }) {
  const view = new View(model, el);
  return () => view.remove();
}

export default { render };
