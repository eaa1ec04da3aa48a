// Scores as a map: layers across, heads or positions down; the largest by name beside it.
//
// What is in focus and what is chosen is state of the model object; linked views follow it.

import { keyList } from "./controls.js";
import { make } from "./elements.js";
import { Frame, rendering, reveal } from "./frame.js";
import { paintScores, scoreLayout } from "./maps.js";
import { moved, number, palette } from "./parts.js";

const KEYS = [
  ["arrows", "move over the map"],
  ["[ and ]", "go to the next larger or smaller score"],
  ["Space", "choose what is in focus, or no more"],
  ["Escape", "choose nothing"],
];
const LISTED = 12;

class ScoresView extends Frame {
  constructor(model, el) {
    super(model, el, "scores");
    this.map = make("canvas", { "aria-hidden": "true" });
    const role = { tabindex: "0", role: "application", "aria-roledescription": "map of scores" };
    this.box = make("div", { class: "mk-map", ...role }, this.map);
    this.caption = make("p", { class: "mk-caption", "aria-live": "polite" });
    this.list = make("ol", { class: "mk-top" });
    this.root.append(make("div", { class: "mk-pair" }, make("div", {}, this.box, this.caption), this.list), keyList(KEYS));
    this.box.addEventListener("keydown", (event) => this.keyed(event));
    this.map.addEventListener("click", (event) => this.clicked(event));
    this.map.addEventListener("pointermove", (event) => this.tip(this.told(this.at(event)), event));
    this.map.addEventListener("pointerleave", () => this.tip(null));
    this.watch({ about: () => this.takeData(), "site selection": () => this.paint() }, () => this.paint());
    this.takeData();
  }

  takeData() {
    const { title, cells, unit } = this.about;
    this.title.textContent = title;
    this.box.setAttribute("aria-label", `${title}, in ${unit}. Arrows move, Space chooses.`);
    this.places = new Map(cells.map((cell) => [`${cell.row},${cell.column}`, cell]));
    this.ranked = [...cells].sort((one, other) => Math.abs(other.score) - Math.abs(one.score));
    this.list.setAttribute("aria-label", `the largest of ${cells.length} scores`);
    const item = (cell) => make("button", { type: "button", onclick: () => this.clickedOn(cell) }, this.told(cell));
    this.buttons = this.ranked.slice(0, LISTED).map(item);
    this.list.replaceChildren(...this.buttons.map((button) => make("li", {}, button)));
    this.paint();
  }

  get focused() {
    return this.about.cells.find((cell) => cell.site === this.model.get("site"));
  }

  paint() {
    const { rows, columns, cells, unit } = this.about;
    const room = this.box.parentElement.clientWidth || 600;
    this.layout = scoreLayout(room, rows.length, columns.length, Math.max(...rows.map((row) => row.length)));
    const selected = new Set(this.model.get("selection"));
    const focused = this.focused;
    const told = { rows, columns, cells, colours: palette(true, this.dark), ink: this.ink, numbered: this.ranked.slice(0, 10) };
    paintScores(this.map, { layout: this.layout, ...told, selected, focused });
    const chosen = selected.size ? ` Chosen: ${[...selected].join(" ")}.` : "";
    this.caption.textContent = `${focused ? this.told(focused, true) : `In ${unit}`}.${chosen}`;
    this.buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(selected.has(this.ranked[i].site)));
      button.classList.toggle("mk-from", this.ranked[i] === focused);
    });
  }

  /** A cell in words. */
  told(cell, whole) {
    if (!cell) return null;
    const se = cell.se ? ` ± ${number(cell.se).slice(1)}` : "";
    const metric = whole && cell.metric !== null ? `; metric ${cell.metric.toFixed(3)}` : "";
    return `${cell.site}: ${number(cell.score)}${se}${whole ? ` ${this.about.unit}` : ""}${metric}`;
  }

  at(event) {
    const { margin, wide, high } = this.layout;
    const place = [Math.floor(event.offsetY / high), Math.floor((event.offsetX - margin) / wide)];
    return this.places.get(place.join(","));
  }

  focus(cell) {
    if (!cell) return;
    this.set({ site: cell.site });
    const { margin, wide, high } = this.layout;
    reveal(this.box, margin + cell.column * wide, cell.row * high, wide, high);
  }

  /** The next cell with a score, where a key leads. */
  towards(key) {
    const { rows, columns } = this.about;
    let { row, column } = this.focused ?? { row: 0, column: 0 };
    for (;;) {
      const next = moved(key, row, column, rows.length, columns.length);
      if (!next || (next[0] === row && next[1] === column)) return this.places.get(`${row},${column}`);
      [row, column] = next;
      const found = this.places.get(next.join(","));
      if (found || !key.startsWith("Arrow")) return found;
    }
  }

  clicked(event) {
    const cell = this.at(event);
    this.focus(cell);
    if (cell && (event.shiftKey || event.ctrlKey || event.metaKey)) this.choose(cell.site);
  }

  clickedOn(cell) {
    this.focus(cell);
    this.choose(cell.site);
  }

  keyed(event) {
    const next = moved(event.key, 0, 0, 1, 1);
    const rank = this.ranked.indexOf(this.focused);
    const choose = () => this.choose(this.model.get("site"));
    this.pressed(event, {
      " ": choose,
      Enter: choose,
      "[": () => this.focus(this.ranked[Math.max(0, rank - 1)]),
      "]": () => this.focus(this.ranked[Math.min(this.ranked.length - 1, rank + 1)]),
      Escape: () => this.set({ selection: [] }),
      ...(next && { [event.key]: () => this.focus(this.towards(event.key)) }),
    });
  }
}

export default rendering(ScoresView);
