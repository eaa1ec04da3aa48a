// What can be pressed beside the pictures: which map and layer, the edits, and the list of keys.

import { make } from "./elements.js";

/** Keys and what they do, folded away. */
export function keyList(keys) {
  const list = make("dl", {}, ...keys.flatMap(([key, what]) => [make("dt", {}, key), make("dd", {}, what)]));
  return make("details", { class: "mk-help" }, make("summary", {}, "Keys"), list);
}

/** A labelled menu of [value, text]. */
export function menu(label, name, options, chosen) {
  const items = options.map(([value, text]) => make("option", { value }, text));
  const select = make("select", { "aria-label": name, onchange: () => chosen(select.value) }, ...items);
  return { element: make("label", {}, `${label} `, select), select };
}

const button = (text, key, action) =>
  make("button", { type: "button", "aria-keyshortcuts": key, title: `${text} (${key})`, onclick: action }, text);

/** Buttons and a slider for edits; edit(how, alpha), undo() and clear() carry them out. */
export function editControls(compare, { edit, undo, clear }) {
  const range = { type: "range", min: "-1", max: "2", step: "0.25", value: "1", "aria-label": "scale" };
  const slider = make("input", { ...range, onchange: () => edit("scale", Number(slider.value)) });
  const elements = [
    button("Ablate", "A", () => edit("ablate")),
    ...(compare ? [button("Patch", "P", () => edit("patch"))] : []),
    make("label", {}, "Scale ", slider),
    button("Undo", "U", undo),
    button("Undo all", "0", clear),
  ];
  return { elements, slider };
}

/** What can be done to a circuit: a slider over its size, cuts, groups. */
export function circuitControls({ size, cut, undo, clear, group }) {
  const range = { type: "range", min: "0", step: "1", "aria-label": "members left in" };
  const slider = make("input", { ...range, oninput: () => size(Number(slider.value)) });
  const entered = (event) => event.key === "Enter" && group();
  const name = make("input", { class: "mk-name", "aria-label": "name of a group", placeholder: "name", onkeydown: entered });
  const elements = [
    make("label", {}, "Size ", slider, make("output", {})),
    button("Cut", "X", cut),
    button("Undo", "U", undo),
    button("Undo all", "0", clear),
    make("span", { class: "mk-together" }, name, button("Group", "G", group)),
  ];
  return { elements, slider, name };
}

/** The tokens as buttons; over(i or null) and lock(i) are told. */
export function tokenButtons(texts, { over, lock }) {
  return texts.map((text, i) => {
    const listeners = {
      onclick: () => lock(i),
      onpointerenter: () => over(i),
      onpointerleave: () => over(null),
      onfocus: () => over(i),
      onblur: () => over(null),
    };
    return make("button", { class: "mk-word", type: "button", "aria-pressed": "false", ...listeners }, text);
  });
}
