/** What is shown while an answer is under way: what is done, how far, how long still, and a way to stop. */

import { button, element } from "./dom.js";
import { left, lasting, number, percent, plural, t, time } from "./strings.js";
import { say } from "./notices.js";

/** Milliseconds: no time left is named before this long, and progress is read aloud at most this often. */
const SETTLE = 3000;
const READ_EVERY = 20_000;

export class Working {
  #stage = element("b");
  #left = element("span", { class: "soft figure" });
  #fill = element("span");
  #bar = element("span", { class: "bar-box", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, this.#fill);
  #stop;
  #more = element("p", { class: "hint" });
  #began = performance.now();
  #read = performance.now();
  #shownLeft = null;
  #seen = "";
  #places = "";

  constructor(stop) {
    this.#stop = button(t("stop"), stop, { icon: "stop", class: "stop" });
    this.#stage.textContent = t("work.sent");
    this.#bar.hidden = true;
    this.node = element(
      "div", { class: "working", "aria-live": "off" },
      element("div", { class: "line" }, this.#stage, this.#left),
      element("div", { class: "line" }, this.#bar, this.#stop), this.#more,
    );
  }

  title(text) {
    this.#stage.textContent = text;
  }

  /** A phase of an answer: `{phase, done, total}`. */
  phase({ phase, done, total }) {
    this.#show(t(`work.${phase}`), done, total, null);
    this.#more.textContent = total ? t("work.of", { done: number(done), total: number(total) }) : "";
  }

  /** A stage of a search: `{stage, done, total, unit, left}`. */
  search({ stage, done, total, unit, left: seconds }) {
    const isPlaces = stage === "close" || stage === "verify";
    const words = isPlaces ? { done: number(Math.min(done + 1, total)), total: number(total) } : {};
    this.#show(t(`search.${stage}`, words), done, total, seconds);
    const seen = stage === "coarse" || stage === "index";
    if (seen) this.#seen = unit === "s" && done >= 1 ? t("search.upto", { time: time(done, 0) }) : "";
    this.#more.textContent = [this.#seen, this.#places].filter(Boolean).join(" ");
    if (performance.now() - this.#read < READ_EVERY) return;
    this.#read = performance.now();
    say([this.#stage.textContent, this.#left.textContent].filter(Boolean).join(", "));
  }

  /** How many moments there are so far; stopping keeps them. */
  found(count) {
    this.#places = plural("search.places", count);
    this.#stop.lastChild.textContent = t("stop.keep");
    this.#more.textContent = [this.#seen, this.#places].filter(Boolean).join(" ");
  }

  #show(text, done, total, seconds) {
    this.#stage.textContent = text;
    this.#bar.hidden = !total;
    this.#bar.setAttribute("aria-label", text);
    const share = total ? Math.min(1, done / total) : 0;
    this.#bar.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    this.#bar.setAttribute("aria-valuetext", percent(share));
    this.#fill.style.width = `${share * 100}%`;
    this.#left.textContent = this.#timeLeft(seconds);
  }

  /** From the third second on; a time that grows by more than a quarter is said to. */
  #timeLeft(seconds) {
    if (seconds === null || performance.now() - this.#began < SETTLE) return "";
    const before = this.#shownLeft;
    const grows = before !== null && seconds > before * 1.25;
    if (before === null || seconds < before || grows) this.#shownLeft = seconds;
    return grows ? `${t("left.longer")} ${left(seconds)}` : left(this.#shownLeft);
  }
}

export function doneLine(seconds, count) {
  return plural("search.done", count, { time: lasting(seconds) });
}
