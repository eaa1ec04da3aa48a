// Edits on their way to the kernel: one run at a time, later edits wait, and only the newest of them is sent.

const PATIENCE = 60_000; // ms, after which a kernel counts as gone
const LOOK = 1_000; // ms between two looks whether there still is a kernel, while a run is on

/** Sends edits by setting `changes` and `asked`; an answer is a `result` with the same number. */
export class Asking {
  constructor(model) {
    this.model = model;
    this.waiting = null;
    this.kernel = model.widget_manager?.kernel;
  }

  /** The edits that are, or will be, in force. */
  get edits() {
    return this.waiting ?? this.model.get("changes");
  }

  get late() {
    return this.started !== undefined && performance.now() - this.started > PATIENCE;
  }

  /** There is no kernel any more, or another one: nobody will answer. Hosts that tell neither are waited for. */
  get gone() {
    return this.cut || Boolean(this.kernel && this.model.widget_manager.kernel !== this.kernel);
  }

  get running() {
    return this.model.get("asked") > (this.model.get("result")?.answered ?? 0) && !this.late && !this.gone;
  }

  /** The host says that the connection to the kernel was cut. */
  lost() {
    this.cut = true;
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
    clearTimeout(this.timer);
    const waits = this.model.get("asked") > (this.model.get("result")?.answered ?? 0);
    const told = this.gone
      ? "The kernel is gone. What is shown is from before; run the cell again."
      : this.late && waits
        ? "The kernel has not answered for a minute. What is shown is from before."
        : null;
    element.classList.toggle("mk-running", this.running);
    if (told) element.dataset.told = told;
    else delete element.dataset.told;
    if (this.running) this.timer = setTimeout(() => this.shownOn(element), LOOK);
  }
}
