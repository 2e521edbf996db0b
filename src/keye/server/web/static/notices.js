/**
 * What is said for a moment: a line at the foot of the page with an optional way back, and the same for screen readers.
 */

import { button, byId } from "./dom.js";
import { t } from "./strings.js";

/** Milliseconds: with a way back a line stays as long as the way is open. */
const STAYS = 4000;
const UNDO_STAYS = 8000;

let timer = 0;

/** Says `text` to screen readers, once. */
export function say(text) {
  const region = byId("status");
  // The same sentence twice is read twice only if the text changes in between.
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** Shows and says `text`; `undo`, if given, is offered for eight seconds. */
export function toast(text, undo = null) {
  const box = byId("toast");
  const back = undo && button(t("undo"), () => {
    box.hidden = true;
    undo();
  });
  box.replaceChildren(text, ...(back ? [back] : []));
  box.hidden = false;
  say(text);
  clearTimeout(timer);
  timer = setTimeout(() => (box.hidden = true), undo ? UNDO_STAYS : STAYS);
}
