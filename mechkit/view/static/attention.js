// Attention of every head: a grid of thumbnails by layer, one head large, tokens as text, and edits of a live model.
//
// 1. Maps come as bytes, a value a cell, heads one after the other: the grid is painted from them, a strip a layer, and
//    the head in focus as well until its exact values (half precision) arrive.
// 2. What is chosen, edited and shown is state of the model object that the host keeps (traits of the Python widget, or
//    the stand-in of an exported page). This file knows no language model: it asks for a head's values, and for what
//    edits do, by setting state.
// 3. While a run is on, later edits wait, and only the newest of them is sent.
// 4. The keyboard does what the pointer does: arrows move, Enter chooses, letters act (listed under "?").

// -- pure functions ------------------------------------------------------------------------------------------

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

// -- the view ------------------------------------------------------------------------------------------------

const LABELLED = 40; // tokens at most that are written on the axes

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

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function isDark(element) {
  let at = element;
  while (at) {
    const parts = getComputedStyle(at).backgroundColor.match(/[\d.]+/g);
    if (parts && (parts.length < 4 || Number(parts[3]) > 0.5)) {
      const [r, g, b] = parts.map(Number);
      return 0.299 * r + 0.587 * g + 0.114 * b < 128;
    }
    at = at.parentElement;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function bytesOf(view) {
  if (!view) return new Uint8Array(0);
  return view instanceof ArrayBuffer ? new Uint8Array(view) : new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

class View {
  constructor(model, el) {
    this.model = model;
    this.el = el;
    this.lockedToken = null;
    this.hoverToken = null;
    this.waiting = null; // the newest edits that have not been sent
    this.sent = 0;
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
    this.resized = new ResizeObserver(() => this.resize());
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
    const keys = make("dl", {}, ...KEYS.flatMap(([key, what]) => [make("dt", {}, key), make("dd", {}, what)]));
    this.help = make("details", { class: "mk-help" }, make("summary", {}, "Keys"), keys);
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
    this.words.replaceChildren(
      ...tokens.map((token, i) =>
        make(
          "button",
          {
            class: "mk-word",
            type: "button",
            "aria-pressed": "false",
            onclick: () => this.lock(this.lockedToken === i ? null : i),
            onpointerenter: () => this.overToken(i),
            onpointerleave: () => this.overToken(null),
            onfocus: () => this.overToken(i),
            onblur: () => this.overToken(null),
          },
          visible(token),
        ),
      ),
    );
    this.buildChoices();
    this.buildActions();
    this.resize();
    this.showFocus();
    this.showEdits();
    this.showResult();
  }

  buildChoices() {
    const { maps, layers } = this.about;
    const option = (value, text) => make("option", { value }, text);
    this.mapChoice = make(
      "select",
      { "aria-label": "map", onchange: () => this.set({ map: this.mapChoice.value }) },
      ...maps.map((one) => option(one.name, one.name)),
    );
    this.layerChoice = make(
      "select",
      { "aria-label": "layer", onchange: () => this.set({ layer: Number(this.layerChoice.value) }) },
      option(-1, "every layer"),
      ...Array.from({ length: layers }, (_, i) => option(i, `layer ${i}`)),
    );
    this.choices.replaceChildren(make("label", {}, "Map ", this.mapChoice), make("label", {}, "Show ", this.layerChoice));
  }

  buildActions() {
    if (!this.about.live) return;
    const button = (text, key, action) =>
      make("button", { type: "button", "aria-keyshortcuts": key, title: `${text} (${key})`, onclick: action }, text);
    this.slider = make("input", {
      type: "range",
      min: "-1",
      max: "2",
      step: "0.25",
      value: "1",
      "aria-label": "scale",
      onchange: () => this.edit("scale", Number(this.slider.value)),
    });
    const buttons = [button("Ablate", "A", () => this.edit("ablate"))];
    if (this.about.compare) buttons.push(button("Patch", "P", () => this.edit("patch")));
    this.actions.replaceChildren(
      ...buttons,
      make("label", {}, "Scale ", this.slider),
      button("Undo", "U", () => this.undo()),
      button("Undo all", "0", () => this.ask([])),
    );
  }

  mapIndex() {
    return Math.max(0, this.about.maps.findIndex((one) => one.name === this.model.get("map")));
  }

  headBytes(layer, head) {
    const { layers, heads, tokens } = this.about;
    const size = tokens.length ** 2;
    const start = ((this.mapIndex() * layers + layer) * heads + head) * size;
    return this.bytes.subarray(start, start + size);
  }

  /** The exact values of the head in focus where they have arrived, else those of its bytes. */
  focusValues() {
    const [layer, head] = this.focused;
    const { signed, limit, name } = this.about.maps[this.mapIndex()];
    if (this.model.get("exact_of") === `${name}|${layer}.${head}`) {
      const bytes = bytesOf(this.model.get("exact_values"));
      return fromHalf(new Uint16Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)));
    }
    return Float32Array.from(this.headBytes(layer, head), (byte) => fromByte(byte, signed, limit));
  }

  // -- painting -----------------------------------------------------------------------------------------------

  resize() {
    this.paintAll();
  }

  rows() {
    const layer = this.model.get("layer");
    return layer >= 0 ? [layer] : Array.from({ length: this.about.layers }, (_, i) => i);
  }

  paintAll() {
    this.paintGrid();
    this.paintFocus();
  }

  context(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return context;
  }

  paintGrid() {
    const { heads, tokens, maps, scores } = this.about;
    const rows = this.rows();
    const wide = this.root.clientWidth || 900;
    this.layout = gridLayout(wide < 720 ? wide : 0.42 * wide, 620, rows.length, heads);
    this.mapChoice.value = maps[this.mapIndex()].name;
    this.layerChoice.value = String(this.model.get("layer"));
    const { cell, step, margin } = this.layout;
    const context = this.context(this.grid, this.layout.width, this.layout.height);
    const style = getComputedStyle(this.root);
    context.clearRect(0, 0, this.layout.width, this.layout.height);
    context.fillStyle = style.color;
    context.font = "11px sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const every = cell >= 16 ? 1 : Math.ceil(18 / step);
    for (let head = 0; head < heads; head += every) context.fillText(head, margin + head * step + cell / 2, margin / 2);
    for (let i = 0; i < rows.length; i += every) context.fillText(rows[i], margin / 2, margin + i * step + cell / 2);
    const colours = palette(maps[this.mapIndex()].signed, isDark(this.el));
    const n = tokens.length;
    const one = new OffscreenCanvas(n, n * heads);
    const strip = one.getContext("2d");
    context.imageSmoothingEnabled = cell < n;
    rows.forEach((layer, i) => {
      const { layers } = this.about;
      const start = (this.mapIndex() * layers + layer) * heads * n * n;
      const bytes = this.bytes.subarray(start, start + heads * n * n);
      if (bytes.length < heads * n * n) return;
      strip.putImageData(new ImageData(painted(bytes, colours), n, n * heads), 0, 0);
      for (let head = 0; head < heads; head++) {
        context.drawImage(one, 0, head * n, n, n, margin + head * step, margin + i * step, cell, cell);
      }
    });
    const selected = new Set(this.model.get("selection"));
    const changed = new Set(this.model.get("changes").map((edit) => edit.head));
    const largest = scores ? Math.max(...scores.values.map((v) => Math.abs(v ?? 0))) || 1 : 1;
    rows.forEach((layer, i) => {
      for (let head = 0; head < heads; head++) {
        const name = `${layer}.${head}`;
        const x = margin + head * step;
        const y = margin + i * step;
        const value = scores ? scores.values[layer * heads + head] : null;
        if (value !== null && Math.abs(value) > 0.02 * largest) {
          context.strokeStyle = value > 0 ? "#0072B2" : "#D55E00";
          context.lineWidth = 1 + (2 * Math.abs(value)) / largest;
          context.setLineDash(value > 0 ? [] : [3, 2]);
          context.strokeRect(x - 0.5, y - 0.5, cell + 1, cell + 1);
          context.setLineDash([]);
        }
        if (selected.has(name)) this.frame(context, x, y, cell, style.color, 1.5);
        if (changed.has(name)) {
          context.strokeStyle = "#CC3311";
          context.lineWidth = 1.5;
          context.beginPath();
          context.moveTo(x + 1, y + 1);
          context.lineTo(x + cell - 1, y + cell - 1);
          context.stroke();
        }
      }
    });
    const [layer, head] = this.focused;
    const row = rows.indexOf(layer);
    if (row >= 0) this.frame(context, margin + head * step - 1, margin + row * step - 1, cell + 2, "#E69F00", 2.5);
  }

  frame(context, x, y, size, colour, width) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x, y, size, size);
  }

  paintFocus() {
    const { tokens, maps } = this.about;
    const n = tokens.length;
    const { signed, limit } = maps[this.mapIndex()];
    const margin = n <= LABELLED ? 74 : 0; // for tokens on both axes
    const side = Math.max(140, Math.min(400, this.largeBox.clientWidth || 320) - margin);
    const context = this.context(this.large, side + margin, side + margin);
    this.largeLayout = { margin, side };
    const values = this.focusValues();
    const bytes = Uint8Array.from(values, (value) => {
      const share = Math.max(-1, Math.min(1, value / (limit || 1)));
      return signed ? 128 + Math.round(127 * share) : Math.round(255 * Math.max(0, share));
    });
    const one = new OffscreenCanvas(n, n);
    one.getContext("2d").putImageData(new ImageData(painted(bytes, palette(signed, isDark(this.el))), n, n), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(one, margin, 0, side, side);
    if (margin) this.label(context, margin, side);
    const row = this.hoverToken ?? this.lockedToken;
    if (row !== null) {
      context.strokeStyle = "#E69F00";
      context.lineWidth = 2;
      context.strokeRect(margin, (row * side) / n, side, side / n);
    }
    this.paintWords(values);
  }

  /** Tokens beside the rows, and under the columns, of the large map. */
  label(context, margin, side) {
    const { tokens } = this.about;
    const step = side / tokens.length;
    context.fillStyle = getComputedStyle(this.root).color;
    context.font = `${Math.max(8, Math.min(11, step - 1))}px sans-serif`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    tokens.forEach((token, i) => {
      const text = shortened(visible(token).trim(), 11);
      context.fillText(text, margin - 5, (i + 0.5) * step);
      context.save();
      context.translate(margin + (i + 0.5) * step, side + 5);
      context.rotate(-Math.PI / 2);
      context.fillText(text, 0, 0);
      context.restore();
    });
  }

  paintWords(values) {
    const n = this.about.tokens.length;
    const row = this.hoverToken ?? this.lockedToken;
    const limit = this.about.maps[this.mapIndex()].limit || 1;
    const buttons = this.words.children;
    for (let i = 0; i < buttons.length; i++) {
      const value = row === null || i > row ? 0 : values[row * n + i];
      const colour = value < 0 ? "230,159,0" : "0,114,178";
      buttons[i].style.background = value ? `rgba(${colour},${Math.min(0.6, (0.6 * Math.abs(value)) / limit)})` : "";
      buttons[i].classList.toggle("mk-from", i === row);
      buttons[i].setAttribute("aria-pressed", String(i === this.lockedToken));
      buttons[i].title = row === null || i > row ? visible(this.about.tokens[i]) : `${visible(this.about.tokens[i])}: ${value.toFixed(3)}`;
    }
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
    const value = this.focusValues()[row * tokens.length + column];
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
    this.ask(heads.reduce((edits, head) => edited(edits, one(head)), this.model.get("changes")));
  }

  undo() {
    this.ask(this.model.get("changes").slice(0, -1));
  }

  ask(edits) {
    if (this.running()) {
      this.waiting = edits; // a newer one takes its place
      this.showRunning();
      return;
    }
    this.sent += 1;
    this.started = performance.now();
    this.set({ changes: edits, asked: this.model.get("asked") + 1 });
    this.showRunning();
  }

  running() {
    const result = this.model.get("result");
    return this.about.live && this.model.get("asked") > (result?.answered ?? 0) && !this.dead();
  }

  dead() {
    return this.started !== undefined && performance.now() - this.started > 60000;
  }

  showRunning() {
    this.table.classList.toggle("mk-running", this.running());
    clearTimeout(this.patience);
    if (this.running()) {
      this.patience = setTimeout(() => {
        this.table.dataset.told = "The kernel has not answered for a minute. What is shown is from before.";
      }, 60000);
    } else delete this.table.dataset.told;
  }

  showEdits() {
    const edits = this.model.get("changes");
    this.list.replaceChildren(
      ...edits.map((edit) =>
        make(
          "li",
          {},
          told(edit),
          " ",
          make(
            "button",
            {
              type: "button",
              "aria-label": `undo: ${told(edit)}`,
              onclick: () => this.ask(this.model.get("changes").filter((one) => one.head !== edit.head)),
            },
            "×",
          ),
        ),
      ),
    );
    this.showFocus();
    this.showRunning();
  }

  showResult() {
    const result = this.model.get("result");
    this.showRunning();
    if (this.waiting && !this.running()) {
      const edits = this.waiting;
      this.waiting = null;
      this.ask(edits);
      return;
    }
    if (!result?.rows) return this.table.replaceChildren(result?.error ? make("p", { class: "mk-error" }, result.error) : "");
    const cell = (text, name = "td") => make(name, name === "th" ? { scope: "col" } : {}, text);
    const head = make("tr", {}, ...["next token", "before", "now", ""].map((text) => cell(text, "th")));
    const rows = result.rows.map(({ token, before, now }) => {
      const change = now - before;
      const mark = Math.abs(change) < 0.005 ? "" : change > 0 ? "▲" : "▼";
      const bar = make("span", { class: "mk-bar", style: `width:${Math.round(60 * now)}px` });
      return make("tr", {}, cell(visible(token)), cell(before.toFixed(3)), cell(now.toFixed(3)), make("td", {}, bar, ` ${mark}`));
    });
    const parts = [make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))];
    if (result.metric) {
      const { name, before, now } = result.metric;
      parts.unshift(make("p", { class: "mk-metric" }, `${name}: ${before.toFixed(3)} → ${now.toFixed(3)}`));
    }
    if (result.error) parts.unshift(make("p", { class: "mk-error" }, result.error));
    this.table.replaceChildren(...parts);
  }
}

export function render({ model, el }) {
  const view = new View(model, el);
  return () => view.remove();
}

export default { render };
