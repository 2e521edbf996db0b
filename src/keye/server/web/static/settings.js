/**
 * The settings drawer and the dialog for the key. Settings are kept in this browser, the key in this tab only.
 */

import { onKeyNeeded, storedKey, storeKey } from "./api.js";
import { byId } from "./dom.js";

const STORE = "keye.settings";
const THEMES = ["auto", "light", "dark"];

/** What a question is sent with: `{temperature, maxTokens, thinking, evidence}`; null leaves it to the server. */
export function options() {
  return {
    temperature: number("temperature"),
    maxTokens: number("max-tokens"),
    thinking: byId("thinking").value,
    evidence: byId("want-evidence").checked,
  };
}

/** The number in a field, or null where it is empty or outside the field's limits. */
export function number(id) {
  const field = byId(id);
  return field.value.trim() === "" || !field.checkValidity() ? null : Number(field.value);
}

/** Connects the drawer, fills it with what was kept, sets the theme. The document fires `theme` and `key` on changes. */
export function startSettings() {
  const kept = readKept();
  for (const id of ["temperature", "max-tokens", "thinking"]) {
    if (typeof kept[id] === "string") byId(id).value = kept[id];
  }
  byId("want-evidence").checked = kept["want-evidence"] !== false;
  setTheme(THEMES.includes(kept.theme) ? kept.theme : "auto");
  byId("settings").addEventListener("change", save);
  byId("theme").addEventListener("change", (event) => setTheme(event.target.value));
  byId("key-field").addEventListener("change", (event) => {
    storeKey(event.target.value.trim());
    document.dispatchEvent(new Event("key"));
  });
  byId("open-settings").addEventListener("click", () => {
    byId("key-field").value = storedKey();
    byId("settings").showModal();
  });
  startKeyDialog();
}

function readKept() {
  try {
    return JSON.parse(localStorage.getItem(STORE) ?? "{}") ?? {};
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return {};
  }
}

function save() {
  const fields = ["temperature", "max-tokens", "thinking", "theme"];
  const values = Object.fromEntries(fields.map((id) => [id, byId(id).value]));
  localStorage.setItem(STORE, JSON.stringify({ ...values, "want-evidence": byId("want-evidence").checked }));
}

function setTheme(theme) {
  byId("theme").value = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("theme"));
}

/** One dialog for all calls that wait for a key at the same time. */
function startKeyDialog() {
  const dialog = byId("key-dialog");
  let waiting = null;
  onKeyNeeded((wrong) => {
    waiting ??= new Promise((resolve) => {
      byId("key-note").textContent = wrong ? "The server does not know this key." : "This server asks for a key.";
      byId("key-input").value = "";
      dialog.returnValue = "";
      dialog.showModal();
      dialog.addEventListener("close", () => {
        waiting = null;
        resolve(dialog.returnValue === "given");
      }, { once: true });
    });
    return waiting;
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    storeKey(byId("key-input").value.trim());
    dialog.close("given");
  });
}
