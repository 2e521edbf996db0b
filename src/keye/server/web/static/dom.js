/**
 * Builds elements. Text is only ever set as text, so nothing a model, a file name or a server says becomes markup.
 *
 * It knows no part of the page. `style` and `on...` attributes are refused: the page's content policy forbids them.
 */

import { icon } from "./icons.js";

/** The element with this id. It must exist: ids are ours. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`The page has no element #${id}.`);
  return found;
}

/**
 * A new element.
 *
 * `options` may hold `class`, `text`, `on` (event name to listener) and attributes; an attribute that is null or false
 * is left out, one that is true is set empty. `children` are nodes or strings; strings become text nodes.
 */
export function element(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key === "on") for (const [type, listener] of Object.entries(value)) node.addEventListener(type, listener);
    else if (/^(on|style$|srcdoc$)/i.test(key)) throw new Error(`The attribute ${key} is not allowed.`);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A button that submits nothing; `options.icon` names its picture, which stands alone where there is no `label`. */
export function button(label, listener, { icon: name, ...options } = {}) {
  const picture = name ? icon(name) : null;
  const text = label ? element("span", { text: label }) : null;
  return element("button", { type: "button", ...options, on: { click: listener } }, picture, text);
}

/** A button that shows only a picture: `label` is its name, also for a pointer that rests on it. */
export function iconButton(name, label, listener, options = {}) {
  const classes = ["icon-button", options.class].filter(Boolean).join(" ");
  return button("", listener, { icon: name, "aria-label": label, title: label, ...options, class: classes });
}

/** Whether keys typed now belong to a field. */
export function isTyping(target) {
  return target instanceof HTMLElement && /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
}

/** Offers `blob` as a download called `name`. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  // The download has taken hold of the data by the next turn of a minute; until then the address must stay valid.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Copies `text`; resolves to whether that worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    if (!(error instanceof DOMException || error instanceof TypeError)) throw error;
    return copyBySelection(text);
  }
}

/** The clipboard interface exists only on loopback and https; this older way works on plain http as well. */
function copyBySelection(text) {
  const field = element("textarea", { class: "visually-hidden", readonly: true });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}
