/**
 * Where the page is, kept in the fragment of its address, so that questions stay out of the logs of servers:
 * `#/desk?file=ID&mode=find&q=...&t=4351.2,4354.0`. Pure but for `location`; it draws nothing.
 */

export const PLACES = ["desk", "library", "activity", "settings"];
const MAX_QUESTION = 2000;

/** `{place, item, file, mode, question, range, threshold, order}` of a fragment; what is missing or wrong is null. */
export function parseRoute(fragment) {
  const [path, query = ""] = fragment.replace(/^#\/?/, "").split("?", 2);
  const [place, item = ""] = path.split("/", 2);
  const fields = new URLSearchParams(query);
  const mode = fields.get("mode");
  const from = Number(fields.get("from") ?? NaN);
  return {
    place: PLACES.includes(place) ? place : "desk",
    item: decode(item),
    file: /^[\w-]{1,200}$/.test(fields.get("file") ?? "") ? fields.get("file") : null,
    mode: ["find", "ask"].includes(mode) ? mode : null,
    question: (fields.get("q") ?? "").slice(0, MAX_QUESTION) || null,
    range: parseRange(fields.get("t") ?? ""),
    threshold: from >= 0 && from <= 1 ? from : null,
    order: fields.get("order") === "video" ? "video" : "best",
  };
}

function decode(text) {
  try {
    return decodeURIComponent(text) || null;
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    return null;
  }
}

function parseRange(text) {
  if (!/^[0-9.]{1,12}(,[0-9.]{1,12})?$/.test(text)) return null;
  const [start, end = start] = text.split(",").map(Number);
  return Number.isFinite(start) && Number.isFinite(end) && start <= end ? [start, end] : null;
}

/** The fragment of a route; fields that are null are left out. */
export function formatRoute({ place, item, file, mode, question, range, threshold, order }) {
  const fields = new URLSearchParams();
  if (file) fields.set("file", file);
  if (mode) fields.set("mode", mode);
  if (question) fields.set("q", question.slice(0, MAX_QUESTION));
  if (range) fields.set("t", range.map((seconds) => String(Math.round(seconds * 1000) / 1000)).join(","));
  if (threshold !== null && threshold !== undefined) fields.set("from", String(threshold));
  if (order && order !== "best") fields.set("order", order);
  const query = fields.toString().replaceAll("%2C", ",");
  return `#/${place}${item ? `/${encodeURIComponent(item)}` : ""}${query ? `?${query}` : ""}`;
}

export function route() {
  return parseRoute(location.hash);
}

/** The address of a route, to be copied. */
export function addressOf(target) {
  return location.href.split("#")[0] + formatRoute(target);
}

/** Goes to a route as a link would. */
export function go(target) {
  location.hash = formatRoute(target);
}

/** Puts a route into the address without a step of the history and without an event. */
export function note(target) {
  history.replaceState(null, "", formatRoute(target));
}
