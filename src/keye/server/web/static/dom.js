/**
 * Builds elements. Text is only ever set as text, so nothing a model, a file name or a server says becomes markup.
 *
 * It knows no part of the page. `style` and `on...` attributes are refused: the page's content policy forbids them.
 */

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

/** A button that submits nothing. */
export function button(label, listener, options = {}) {
  return element("button", { type: "button", text: label, ...options, on: { click: listener } });
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

/** Copies `text`, and says on the button for a moment whether that worked. */
export async function copyText(text, source) {
  const label = source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    source.textContent = "Copied";
  } catch (error) {
    if (!(error instanceof DOMException || error instanceof TypeError)) throw error;
    source.textContent = copyBySelection(text) ? "Copied" : "Copying is not allowed here";
  }
  setTimeout(() => (source.textContent = label), 1500);
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
