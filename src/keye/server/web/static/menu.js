/**
 * A menu behind a button: opened by a press or the arrow keys, left by Esc, a choice or a press elsewhere.
 */

import { element } from "./dom.js";

/** The menu `label` with `entries` of `[text, listener(source)]`; `source` is the button of the menu. */
export function menu(label, entries) {
  const opener = element("button", {
    type: "button", class: "more", text: "More", "aria-label": label, "aria-haspopup": "menu", "aria-expanded": "false",
  });
  const items = entries.map(([text, listener]) => element("button", {
    type: "button", role: "menuitem", tabindex: "-1", text,
    on: {
      click: () => {
        close();
        listener(opener);
      },
    },
  }));
  const list = element("div", { role: "menu", "aria-label": label, hidden: true }, ...items);
  const box = element("span", { class: "menu" }, opener, list);

  const away = (event) => {
    if (!box.contains(event.target)) close(false);
  };

  function open(at = 0) {
    list.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    // Where the lower edge of the window is near, the menu opens upwards.
    list.classList.toggle("above", opener.getBoundingClientRect().bottom + list.offsetHeight > window.innerHeight);
    items.at(at).focus();
    document.addEventListener("pointerdown", away);
  }

  function close(focus = true) {
    list.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", away);
    if (focus) opener.focus();
  }

  opener.addEventListener("click", () => (list.hidden ? open() : close()));
  box.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 };
    if (event.key === "Escape" && !list.hidden) close();
    else if (event.key === "Tab" && !list.hidden) return close(false);
    else if (event.key in steps && list.hidden) open(event.key === "ArrowUp" ? -1 : 0);
    else if (event.key in steps) items[(steps[event.key] + items.length) % items.length].focus();
    else return undefined;
    event.preventDefault();
    return event.stopPropagation();
  });
  return box;
}
