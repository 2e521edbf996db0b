/** Sentences that must be seen, each with its icon: calm, good to know, a warning, or an error. */

import { element } from "./dom.js";
import { icon } from "./icons.js";
import { hasText, said, t } from "./strings.js";

/** What is known of notes by their code, or by a phrase where the server sends none. */
const KINDS = [
  ["outside_time", /outside what was looked at/, "warn", "note.outside"],
  ["loop", /repeated itself/, "warn", "note.loop"],
  ["scope", /does not know|drawn shapes|its words/, "warn", "note.scope"],
];

/** A box: `title` in bold where there is one, then `text`; `kind` is "", "tint", "warn" or "wrong". */
export function noteBox(kind, title, text, ...more) {
  const sign = kind === "warn" || kind === "wrong" ? "warning" : "info";
  const body = element("div", {}, title ? element("b", { text: title }) : null, title && text ? " " : null, text ?? null);
  return element("div", { class: `note ${kind}`.trim(), role: kind === "wrong" ? "alert" : null }, icon(sign), body, ...more);
}

/** The code of a note, also of one that came as a plain sentence; "" where nothing is known of it. */
export function codeOf({ code, text }) {
  return KINDS.find(([name, phrase]) => (code ? name === code : phrase.test(text)))?.[0] ?? code;
}

/** The box of a note of the server, in the words of the page where it is known. */
export function serverNote(note) {
  const known = KINDS.find(([name]) => name === codeOf(note));
  const sentence = said(note.text);
  if (!known) return noteBox("", "", hasText(`note.${note.code}`) ? t(`note.${note.code}`) : sentence);
  const [, , kind, key] = known;
  return noteBox(kind, t(key), sentence);
}
