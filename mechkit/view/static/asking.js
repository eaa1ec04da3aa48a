// Edits on their way to the kernel: one run at a time, later edits wait, and only the newest of them is sent.

const PATIENCE = 60_000; // ms, after which a kernel counts as gone

/** Sends edits by setting `changes` and `asked`; an answer is a `result` with the same number. */
export class Asking {
  constructor(model) {
    this.model = model;
    this.waiting = null;
  }

  /** The edits that are, or will be, in force. */
  get edits() {
    return this.waiting ?? this.model.get("changes");
  }

  get running() {
    const late = this.started !== undefined && performance.now() - this.started > PATIENCE;
    return this.model.get("asked") > (this.model.get("result")?.answered ?? 0) && !late && !this.gone;
  }

  /** The host says that the kernel's connection has changed: what was asked will not be answered. */
  lost() {
    this.gone = true;
    this.waiting = null;
  }

  send(edits) {
    this.waiting = null;
    if (this.gone) return;
    if (this.running) {
      this.waiting = edits;
      return;
    }
    this.started = performance.now();
    this.model.set("changes", edits);
    this.model.set("asked", this.model.get("asked") + 1);
    this.model.save_changes();
  }

  /** After an answer: send what waited. True where something did. */
  goOn() {
    if (this.waiting === null || this.running) return false;
    this.send(this.waiting);
    return true;
  }

  /** Show on an element whether a run is on, and say so when none answers, or when there is no kernel any more. */
  shownOn(element) {
    element.classList.toggle("mk-running", this.running);
    clearTimeout(this.timer);
    delete element.dataset.told;
    if (this.gone) element.dataset.told = "The kernel is gone. What is shown is from before; run the cell again.";
    if (!this.running) return;
    this.timer = setTimeout(() => {
      element.classList.remove("mk-running");
      element.dataset.told = "The kernel has not answered for a minute. What is shown is from before.";
    }, PATIENCE);
  }
}
