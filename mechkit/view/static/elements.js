// Small pieces of the page: elements, the table of next tokens, the list of edits, light or dark.

import { visible } from "./parts.js";

/** An element with attributes (those that begin with "on" are listeners) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Whether what an element stands on is dark. */
export function isDark(element) {
  for (let at = element; at; at = at.parentElement ?? at.getRootNode().host) {
    const parts = getComputedStyle(at).backgroundColor.match(/[\d.]+/g);
    if (parts && (parts.length < 4 || Number(parts[3]) > 0.5)) {
      const [r, g, b] = parts.map(Number);
      return 0.299 * r + 0.587 * g + 0.114 * b < 128;
    }
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The bytes of what a model object holds, in whatever form the host gives them. */
export function bytesOf(view) {
  if (!view) return new Uint8Array(0);
  return view instanceof ArrayBuffer ? new Uint8Array(view) : new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** What edits did: an error, a metric, and the next tokens before and now. */
export function answers({ rows, metric, error }) {
  const parts = [];
  if (error) parts.push(make("p", { class: "mk-error" }, error));
  if (metric) {
    const { name, before, now } = metric;
    parts.push(make("p", { class: "mk-metric" }, `${name}: ${before.toFixed(3)} → ${now.toFixed(3)}`));
  }
  if (!rows) return parts;
  const head = ["next token", "before", "now", "change"].map((text) => make("th", { scope: "col" }, text));
  const body = rows.map(({ token, before, now }) => {
    const mark = Math.abs(now - before) < 0.005 ? "" : now > before ? "▲" : "▼";
    const bar = make("span", { class: "mk-bar", style: `width:${Math.round(60 * now)}px` });
    const cells = [visible(token), before.toFixed(3), now.toFixed(3)].map((text) => make("td", {}, text));
    return make("tr", {}, ...cells, make("td", {}, bar, ` ${mark}`));
  });
  parts.push(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  return parts;
}

/** What is changed, each with a button that takes it back; told(one) is what it is called. */
export function takenBack(changes, told, takeBack) {
  return changes.map((one) => {
    const action = { type: "button", "aria-label": `undo: ${told(one)}`, onclick: () => takeBack(one) };
    return make("li", {}, told(one), " ", make("button", action, "×"));
  });
}

/** How faithful a circuit is: an error, faithfulness before and now, its interval, and the metric it stands for. */
export function faithfulnessTold({ faithfulness, low, high, metric, model, error }, whole) {
  const parts = [];
  if (error) parts.push(make("p", { class: "mk-error" }, error));
  if (faithfulness === undefined) return parts;
  const first = whole === undefined ? "" : `${whole.toFixed(3)} → `;
  parts.push(make("p", { class: "mk-metric" }, `faithfulness: ${first}${faithfulness.toFixed(3)}`));
  const told = [];
  if (low !== undefined) told.push(`95% interval ${low.toFixed(2)} to ${high.toFixed(2)}`);
  if (metric !== undefined) told.push(`metric ${metric.toFixed(3)}, of the model ${model.toFixed(3)}`);
  if (told.length) parts.push(make("p", { class: "mk-note" }, told.join("; ")));
  return parts;
}
