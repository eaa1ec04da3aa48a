// What every view does beside its own picture: listens to its state, follows size and theme, shows a tip at the pointer.

import { isDark, make } from "./elements.js";

/** Base of the views. A subclass builds its elements into `this.root`, then calls `watch`. */
export class Frame {
  /**
   * model: the host's model object. el: where the view goes. name: of the view, for styles.
   */
  constructor(model, el, name) {
    this.model = model;
    this.el = el;
    this.listeners = [];
    this.title = make("h3", { class: "mk-title" });
    this.root = make("section", { class: `mk-view mk-${name}` }, this.title);
    this.hint = make("div", { class: "mk-tip", hidden: true });
    this.root.append(this.hint);
    el.append(this.root);
    // Notebooks have keys of their own. JupyterLab takes those that reach it; Notebook 7 takes them first, unless the
    // element that has the focus says otherwise.
    this.keep = (event) => {
      const [target] = event.composedPath();
      if (target instanceof Element && event.composedPath().includes(this.root)) target.toggleAttribute("data-lm-suppress-shortcuts", isPlain(event));
    };
    window.addEventListener("keydown", this.keep, true);
    this.root.addEventListener("keydown", (event) => isPlain(event) && event.stopPropagation());
  }

  /** Paint when these traits change ({"name other": action}), when there is more or less room, and when it gets dark. */
  watch(actions, repaint) {
    for (const [names, action] of Object.entries(actions)) {
      for (const name of names.split(" ")) this.on(`change:${name}`, action);
    }
    this.resized = new ResizeObserver(() => {
      if (this.root.clientWidth !== this.painted) repaint();
      this.painted = this.root.clientWidth;
    });
    this.resized.observe(this.el);
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.rethemed = () => repaint();
    this.theme.addEventListener("change", this.rethemed);
    this.watched = new MutationObserver(this.rethemed);
    const attributes = { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] };
    for (const one of [document.documentElement, document.body]) this.watched.observe(one, attributes);
  }

  on(event, action) {
    this.model.on(event, action);
    this.listeners.push([event, action]);
  }

  remove() {
    this.resized?.disconnect();
    this.watched?.disconnect();
    this.theme?.removeEventListener("change", this.rethemed);
    window.removeEventListener("keydown", this.keep, true);
    for (const [event, action] of this.listeners) this.model.off(event, action);
  }

  get about() {
    return this.model.get("about");
  }

  get dark() {
    return isDark(this.el);
  }

  get ink() {
    return getComputedStyle(this.root).color;
  }

  /** Set traits, and tell the other side. */
  set(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
  }

  /** Choose a site, or no longer. */
  choose(name) {
    const chosen = this.model.get("selection");
    this.set({ selection: chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name] });
  }

  /** Show a text beside the pointer; null: none. */
  tip(text, event) {
    this.hint.hidden = text === null;
    if (text === null) return;
    const box = this.root.getBoundingClientRect();
    this.hint.textContent = text;
    this.hint.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - 170))}px`;
    this.hint.style.top = `${event.clientY - box.top + 14}px`;
  }

  /** Do what a key stands for ({key: action}). */
  pressed(event, actions) {
    if (!isPlain(event)) return;
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

/** Scroll a box so that a place in it is seen. */
export function reveal(box, x, y, wide, high) {
  box.scrollLeft = Math.max(x + wide - box.clientWidth, Math.min(box.scrollLeft, x));
  box.scrollTop = Math.max(y + high - box.clientHeight, Math.min(box.scrollTop, y));
}

/** Whether a key is for the view: one with Ctrl or the like, or that runs a cell, is for the host. */
function isPlain({ ctrlKey, metaKey, altKey, shiftKey, key }) {
  return !ctrlKey && !metaKey && !altKey && !(shiftKey && key === "Enter");
}

/** What a host calls, for a view of this class. */
export function rendering(View) {
  return {
    render({ model, el }) {
      const view = new View(model, el);
      return () => view.remove();
    },
  };
}
