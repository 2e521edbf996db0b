/** The model that the server loaded, and what the server says about it. Fires `model` on the document when it is known. */

import { models } from "./api.js";
import * as data from "./data.js";

let loaded = null;

/** `data.model` of what is served, or null before it is known. */
export function model() {
  return loaded;
}

export async function loadModel() {
  const usable = (await models()).map(data.model).filter(({ id }) => id);
  loaded = usable[0] ?? null;
  document.dispatchEvent(new Event("model"));
}

/** Whether the server says that it can do this. */
export function isAble(capability) {
  return loaded?.capabilities.includes(capability) ?? false;
}
