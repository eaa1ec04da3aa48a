// What can be pressed beside the pictures: which map and layer, the edits, and the list of keys.

import { make } from "./elements.js";

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

/** The keys, folded away. */
export function keyList() {
  const keys = make("dl", {}, ...KEYS.flatMap(([key, what]) => [make("dt", {}, key), make("dd", {}, what)]));
  return make("details", { class: "mk-help" }, make("summary", {}, "Keys"), keys);
}

/** A labelled menu of [value, text]. */
export function menu(label, name, options, chosen) {
  const items = options.map(([value, text]) => make("option", { value }, text));
  const select = make("select", { "aria-label": name, onchange: () => chosen(select.value) }, ...items);
  return { element: make("label", {}, `${label} `, select), select };
}

/** Buttons and a slider for edits; edit(how, alpha), undo() and clear() carry them out. */
export function editControls(compare, { edit, undo, clear }) {
  const button = (text, key, action) =>
    make("button", { type: "button", "aria-keyshortcuts": key, title: `${text} (${key})`, onclick: action }, text);
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
