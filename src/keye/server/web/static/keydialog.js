/** The dialog that asks for the server's key. The key stays in this tab. Fires `key` on the document when it changes. */

import { onKeyNeeded, storeKey } from "./api.js";
import { byId } from "./dom.js";
import { t } from "./strings.js";

let waiting = null;

export function startKeyDialog() {
  const dialog = byId("key-dialog");
  onKeyNeeded((isWrong) => askForKey(isWrong ? "key.unknown" : "key.needed"));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    storeKey(byId("key-input").value.trim());
    dialog.close("entered");
  });
}

/** Resolves to whether a key was entered. */
export function askForKey(sentence = "key.enter") {
  const dialog = byId("key-dialog");
  waiting ??= new Promise((resolve) => {
    byId("key-note").textContent = t(sentence);
    byId("key-input").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      waiting = null;
      resolve(dialog.returnValue === "entered");
    }, { once: true });
  });
  return waiting;
}
