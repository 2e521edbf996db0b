/**
 * What the page says: one table with a column for each language, and numbers, times and dates as its readers write them.
 */

import { TEXTS } from "./texts.js";
import { clock } from "./times.js";

const LANGUAGES = ["en", "zh"];
const LOCALES = ["en-GB", "zh-CN"];
/** Codes of notes, and sentences of the server that the table has in both languages, are shown in the page's own. */
const KNOWN = new Map(Object.values(TEXTS).map((row) => [row[0], row]));

let column = 0;
let hasHours = false;

export function language() {
  return LANGUAGES[column];
}

/** The language that the browser asks for, of those that the page has. */
export function preferredLanguage() {
  return navigator.language.startsWith("zh") ? "zh" : "en";
}

/** Fires `language` on the document after the texts of the markup are set. */
export function setLanguage(code) {
  column = Math.max(0, LANGUAGES.indexOf(code));
  document.documentElement.lang = LOCALES[column];
  translate(document);
  document.dispatchEvent(new Event("language"));
}

/** Sets the texts of elements that name one: `data-t`, and `data-t-ATTRIBUTE` for attributes. */
export function translate(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const attribute of ["aria-label", "placeholder", "title"]) {
    for (const node of root.querySelectorAll(`[data-t-${attribute}]`)) {
      node.setAttribute(attribute, t(node.getAttribute(`data-t-${attribute}`)));
    }
  }
}

/** The text `key` with `values` in the place of `{name}`. */
export function t(key, values = {}) {
  const row = TEXTS[key];
  if (!row) throw new Error(`The table has no text ${key}.`);
  return row[column].replaceAll(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function hasText(key) {
  return key in TEXTS;
}

/** The text for `count` things: `key.one` or `key.other` as the language has it. */
export function plural(key, count, values = {}) {
  const form = new Intl.PluralRules(LOCALES[column]).select(count) === "one" ? "one" : "other";
  return t(`${key}.${form}`, { count: number(count), ...values });
}

/** A sentence of the server, in the page's language where the table has it. */
export function said(sentence) {
  return KNOWN.get(sentence)?.[column] ?? sentence;
}

/** Making a format is slow; those that were made stay. */
const formats = new Map();

function numberFormat(options) {
  const key = LOCALES[column] + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(LOCALES[column], options));
  return formats.get(key);
}

export function number(value, digits = 0) {
  return numberFormat({ minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** "97%". */
export function percent(share, digits = 0) {
  return numberFormat({ style: "percent", maximumFractionDigits: digits }).format(share);
}

/** "77 MB", "1.1 GB". */
export function bytes(count) {
  if (count < 999_500) return `${number(Math.max(1, Math.round(count / 1e3)))} kB`;
  return count < 999_500_000 ? `${number(Math.round(count / 1e6))} MB` : `${number(count / 1e9, 1)} GB`;
}

/** Whether times have hours, as in a video of an hour or more, so that columns align. */
export function setHours(duration) {
  hasHours = (duration ?? 0) >= 3600;
}

export function time(seconds, digits = 1) {
  return clock(seconds, digits, hasHours);
}

/** "0:03.0 – 0:08.5"; times that were not refined have no tenths. */
export function range({ start, end, refined = true }) {
  const digits = refined === false ? 0 : 1;
  return `${time(start, digits)}\u2009–\u2009${time(end, digits)}`;
}

/** The same for ears: "0:03.0 to 0:08.5". */
export function spoken({ start, end, refined = true }) {
  const digits = refined === false ? 0 : 1;
  return t("range.spoken", { start: time(start, digits), end: time(end, digits) });
}

export function seconds(value) {
  return t("seconds", { value: number(value, 1) });
}

/** "1 min 52 s". */
export function lasting(value) {
  const full = Math.round(value);
  if (full < 60) return t("seconds", { value: number(value, value < 9.95 ? 1 : 0) });
  return t("minutes", { minutes: number(Math.floor(full / 60)), seconds: full % 60 });
}

/** "about 40 s left", "6 min left", rounded up. */
export function left(value) {
  if (value < 90) return t("left.seconds", { value: number(Math.max(5, Math.ceil(value / 5) * 5)) });
  return t("left.minutes", { value: number(Math.ceil(value / 60)) });
}

/** "10:42" today, else the day as well. */
export function when(stamp) {
  const date = new Date(stamp);
  const isToday = date.toDateString() === new Date().toDateString();
  const parts = isToday ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(LOCALES[column], parts).format(date);
}
