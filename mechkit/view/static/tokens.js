// A text with its tokens coloured by score: point at one for its numbers, and lock it.

import { keyList } from "./controls.js";
import { make } from "./elements.js";
import { Frame, rendering } from "./frame.js";
import { moved, number, tokenColour, visible } from "./parts.js";

const KEYS = [
  ["left and right", "move over the tokens"],
  ["Space", "lock the token in focus, or no longer"],
  ["Escape", "lock none"],
];

class TokensView extends Frame {
  constructor(model, el) {
    super(model, el, "tokens");
    this.caption = make("p", { class: "mk-caption", "aria-live": "polite" });
    this.words = make("div", { class: "mk-words mk-text", role: "group" });
    this.phrases = make("div", { class: "mk-words", role: "group", "aria-label": "phrases" });
    this.note = make("p", { class: "mk-note" });
    this.root.append(this.words, this.phrases, this.caption, this.note, keyList(KEYS));
    this.words.addEventListener("keydown", (event) => this.keyed(event));
    this.watch({ about: () => this.takeData(), token: () => this.show() }, () => {});
    this.takeData();
  }

  takeData() {
    const { title, tokens, phrases, unit, limit } = this.about;
    this.title.textContent = title;
    this.words.setAttribute("aria-label", `tokens, coloured by ${unit}`);
    const button = (one, i) => {
      const token = i < 0 ? {} : { onclick: () => this.lock(i), onfocus: () => this.show(i), tabindex: i ? "-1" : "0" };
      const over = { onpointerenter: () => this.tell(one), onpointerleave: () => this.show() };
      const style = `background:${tokenColour(one.score, limit)};border-bottom-style:${one.score < 0 ? "dotted" : "solid"}`;
      const label = { "aria-label": this.told(one), style, "aria-pressed": "false" };
      return make("button", { class: "mk-word mk-scored", type: "button", ...label, ...token, ...over }, shown(one.token));
    };
    this.words.replaceChildren(...tokens.map(button));
    this.phrases.replaceChildren(...phrases.map((one) => button(one, -1)));
    this.phrases.hidden = !phrases.length;
    this.note.textContent = `Blue, solid line: for it; orange, dotted line: against it; full colour: ${limit.toPrecision(3)} ${unit}.`;
    this.show();
  }

  told({ token, score, rest }) {
    const others = rest === null ? "" : ` (rest ${number(rest)})`;
    return `${visible(token)}: ${number(score)}${others}`;
  }

  tell(one) {
    this.caption.textContent = one ? `${this.told(one)} ${this.about.unit}` : this.about.total;
  }

  lock(i) {
    this.set({ token: this.model.get("token") === i ? -1 : i });
  }

  /** What is locked, or has the keyboard. */
  show(at = this.model.get("token")) {
    const locked = this.model.get("token");
    Array.from(this.words.children).forEach((word, i) => {
      word.setAttribute("aria-pressed", String(i === locked));
      word.classList.toggle("mk-from", i === locked);
    });
    this.tell(this.about.tokens[at]);
  }

  keyed(event) {
    const words = Array.from(this.words.children);
    const next = moved(event.key, 0, Math.max(0, words.indexOf(document.activeElement)), 1, words.length);
    const go = (i) => {
      words.forEach((word, at) => word.setAttribute("tabindex", at === i ? "0" : "-1"));
      words[i].focus();
    };
    this.pressed(event, {
      Escape: () => this.set({ token: -1 }),
      ...(next && { [event.key]: () => go(next[1]) }),
    });
  }
}

/** A token as text that keeps its spaces; what cannot be seen is named. */
const shown = (token) => (token.trim() === "" || /[\p{Cc}\p{Cf}]/u.test(token) ? visible(token) : token);

export default rendering(TokensView);
