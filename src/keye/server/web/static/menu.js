/**
 * Menus behind buttons: opened by a press or the arrow keys, left by Esc, a choice or a press elsewhere. They lie in
 * the top layer, so that no scrolling part cuts them off.
 */

import { button, element } from "./dom.js";

/** Least pixels between a menu and the edge of the window. */
const MARGIN = 8;

/**
 * Gives the button `opener` a menu. `entries()` is called at each opening and returns `{text, act, icon, key, checked}`; null
 * draws a line. Where an entry has `checked`, it is one of a choice.
 */
export function attachMenu(opener, label, entries) {
  opener.setAttribute("aria-haspopup", "menu");
  opener.setAttribute("aria-expanded", "false");
  const open = (at) => openMenu(opener, label(), entries(), at);
  opener.addEventListener("click", () => open(0));
  opener.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    event.preventDefault();
    event.stopPropagation();
    open(event.key === "ArrowUp" ? -1 : 0);
  });
  return opener;
}

function openMenu(opener, label, entries, at) {
  if (opener.getAttribute("aria-expanded") === "true") return;
  const list = element("div", { role: "menu", "aria-label": label, popover: "auto", class: "menu" });
  const items = [];
  for (const entry of entries) {
    if (entry === null) list.append(element("hr"));
    else list.append(items[items.push(item(entry, () => list.hidePopover())) - 1]);
  }
  list.addEventListener("keydown", (event) => moveBy(event, items, list));
  list.addEventListener("toggle", (event) => {
    const isOpen = event.newState === "open";
    opener.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) return;
    if (list.contains(document.activeElement) || document.activeElement === document.body) opener.focus();
    list.remove();
  });
  opener.after(list);
  list.showPopover();
  opener.setAttribute("aria-expanded", "true");
  placeBy(list, opener);
  items.at(at)?.focus();
}

function item({ text, act, icon, key, checked }, close) {
  const role = checked === undefined ? "menuitem" : "menuitemradio";
  const node = button(text, () => {
    close();
    act();
  }, { icon, role, tabindex: "-1", "aria-checked": checked === undefined ? null : String(checked) });
  if (key) node.append(element("kbd", { text: key }));
  return node;
}

function moveBy(event, items, list) {
  const now = items.indexOf(document.activeElement);
  const steps = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: items.length - 1 };
  if (event.key === "Tab") return list.hidePopover();
  event.stopPropagation();
  if (!(event.key in steps)) return undefined;
  event.preventDefault();
  return items[(steps[event.key] + items.length) % items.length].focus();
}

/** Puts a box of the top layer below an element, or above where there is more room, and inside the window. */
export function placeBy(box, anchor) {
  const { left, right, top, bottom } = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  const isLeft = left + width + MARGIN <= window.innerWidth;
  const below = bottom + 4;
  const x = isLeft ? left : Math.max(MARGIN, right - width);
  const y = below + height + MARGIN <= window.innerHeight ? below : Math.max(MARGIN, top - height - 4);
  box.style.left = `${Math.min(x, window.innerWidth - width - MARGIN)}px`;
  box.style.top = `${y}px`;
}
