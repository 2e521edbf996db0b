/**
 * The moments on the timeline, as buttons: a bar once it is wider than a pin, else a pin with its rank; pins that are
 * too close are one with their number. Buttons are used again, so that dragging makes none.
 */

import { element } from "./dom.js";
import { language, percent, plural, range, spoken, t } from "./strings.js";

/** Pixels from which a moment is a bar, and below which two are one. */
const BAR_FROM = 20;
const JOIN_BELOW = 24;
const MOST = 60;

export class Marks {
  #box;
  #buttons = [];
  #choose;

  /** `choose(moments, button)` is called with what a mark stands for when it is pressed. */
  constructor(box, choose) {
    this.#box = box;
    this.#choose = choose;
  }

  /** Draws `moments`, sorted by their start (with `state`: "solid", "hollow", "dot") over `width` pixels of `view`; `current` is an id. */
  draw(moments, view, width, current, { asPoints = false } = {}) {
    const groups = join(moments, view, width, asPoints).slice(0, MOST);
    groups.forEach((group, i) => this.#update(this.#button(i), group, current));
    for (const unused of this.#buttons.splice(groups.length)) unused.remove();
  }

  #button(i) {
    if (!this.#buttons[i]) {
      const node = element("button", { type: "button" }, element("span"));
      node.addEventListener("click", () => this.#choose(node.moments, node));
      this.#box.append(node);
      this.#buttons.push(node);
    }
    return this.#buttons[i];
  }

  #update(node, group, current) {
    const { moments, left, width } = group;
    const [first] = moments;
    const isBar = width > 0;
    const isCount = moments.length > 1;
    node.style.left = `${left}px`;
    node.style.width = isBar ? `${width}px` : "";
    node.moments = moments;
    // While the view is dragged most marks only move.
    const isCurrent = moments.some(({ id }) => id === current);
    const key = [first.id, moments.length, first.state, first.probability, first.start, isBar && width > 64, isBar, isCurrent, language()].join();
    if (node.dataset.key === key) return;
    node.dataset.key = key;
    const kind = isCount ? (moments.some(({ state }) => state === "solid") ? "solid" : "hollow") : first.state;
    node.className = ["pin", kind, isBar ? "" : "point", isCurrent ? "current" : ""].join(" ");
    const sure = first.probability === null || isCount ? "" : percent(first.probability);
    const words = isCount ? String(moments.length) : isBar && width > 64 ? `${first.rank}  ${sure}` : String(first.rank);
    const text = kind === "dot" ? "" : words.trim();
    node.firstChild.textContent = text;
    const name = isCount ? plural("moments.here", moments.length) : nameOf(first, sure);
    node.setAttribute("aria-label", name);
    node.title = isCount ? name : [range(first), first.label].filter(Boolean).join(" · ");
  }
}

/** The name of a mark begins with what is seen on it. */
function nameOf(moment, sure) {
  const start = [moment.rank, sure].filter(Boolean).join(" ");
  return [t("moment.name", { start, range: spoken(moment) }), moment.label].filter(Boolean).join(", ");
}

/** Groups of moments, which are sorted by their start: `{moments, left, width}` in pixels, `width` 0 for a pin. */
function join(moments, view, width, asPoints) {
  const x = (time) => ((time - view[0]) / (view[1] - view[0])) * width;
  const groups = [];
  for (const moment of moments) {
    if (moment.end < view[0] || moment.start > view[1]) continue;
    const [from, to] = [x(moment.start), x(moment.end)];
    const wide = Math.min(width, to) - Math.max(0, from);
    if (!asPoints && moment.state !== "dot" && wide > BAR_FROM) {
      groups.push({ moments: [moment], left: Math.max(0, from), width: wide });
      continue;
    }
    const left = Math.min(width - 10, Math.max(10, (from + to) / 2));
    const last = groups.at(-1);
    if (last && last.width === 0 && left - last.left < JOIN_BELOW) last.moments.push(moment);
    else groups.push({ moments: [moment], left, width: 0 });
  }
  return groups;
}
