/**
 * Times in answers and for people. It follows `keye.chat.times`: the same text gives the same intervals here.
 *
 * It touches no element of the page, so that it can be tested without a browser.
 */

// Every repetition is bounded, so that matching is linear in the length of any text.
const TIME = String.raw`((?:[0-9]{1,3}:){0,2}[0-9]{1,7}(?:\.[0-9]{1,6})?)`;
const PAIR = new RegExp(String.raw`\[\s{0,4}${TIME} ?s?\s{0,4},\s{0,4}${TIME} ?s?\s{0,4}\]`, "g");
const OPENING = /(?:\[|<\|clip_time_start\|>)\s{0,4}$/;
const COMMA = /^\s{0,4},\s{0,4}$/;
const CLOSING = /^\s{0,4}(?:\]|<\|clip_time_end\|>)/;
const COORDINATES = /<\|(point|box|quad|polygon)_start\|>([\s\S]{0,65536}?)<\|\1_end\|>/g;
const LABELS = /<\|(?:object_ref|ocr_text)_(?:start|end)\|>/g;
const CLOCK = String.raw`\b(?:[0-9]{1,2}:)?[0-9]{1,2}:[0-9]{2}(?:\.[0-9]{1,3})?\b`;
const SECONDS = String.raw`\b[0-9]{1,6}(?:\.[0-9]{1,3})? ?(?:seconds|secs?|s)\b`;
const MOMENT = new RegExp(`${CLOCK}|${SECONDS}`, "g");
const MAX_LABEL = 80;

/** Seconds of "75.5", "1:15.5" or "0:01:15.5"; null for anything else. */
export function toSeconds(text) {
  const time = text.trim();
  if (!new RegExp(`^${TIME}$`).test(time)) return null;
  return time.split(":").reduce((seconds, field) => seconds * 60 + Number(field), 0);
}

/** "0:07.5", "1:07.5", "1:00:07.5"; `digits` decimals, and hours in any case where `hasHours`. */
export function clock(seconds, digits = 1, hasHours = false) {
  const scale = 10 ** digits;
  let rest = Math.round(Math.max(0, seconds) * scale);
  const fraction = rest % scale;
  rest = (rest - fraction) / scale;
  const [hours, minutes] = [Math.floor(rest / 3600), Math.floor(rest / 60) % 60];
  const tail = String(rest % 60).padStart(2, "0") + (digits ? `.${String(fraction).padStart(digits, "0")}` : "");
  return hours || hasHours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

/**
 * The answer as pieces in their order: `{kind: "text", text}`, `{kind: "interval", start, end, label}`,
 * `{kind: "moment", text, at}` and `{kind: "region", name, text}`. The brackets of lists and the marks of the model's
 * syntax are left out of the text.
 */
export function pieces(text) {
  const found = [];
  let from = 0;
  for (const block of text.matchAll(COORDINATES)) {
    found.push(...timed(text.slice(from, block.index)));
    found.push({ kind: "region", name: block[1], text: block[2] });
    from = block.index + block[0].length;
  }
  found.push(...timed(text.slice(from)));
  return withLabels(found.filter((piece) => piece.kind !== "text" || piece.text));
}

/** The intervals written in `text`, in their order. */
export function parseIntervals(text) {
  return pieces(text)
    .filter((piece) => piece.kind === "interval")
    .map((piece) => [piece.start, piece.end]);
}

/** Intervals, moments and text of a stretch without coordinates. */
function timed(text) {
  const found = [];
  let [from, previous] = [0, -1];
  for (const match of text.matchAll(PAIR)) {
    const continues = previous >= 0 && COMMA.test(text.slice(previous, match.index));
    const before = text.slice(Math.max(0, match.index - 24), match.index);
    if (!continues && !OPENING.test(before)) {
      previous = -1;
      continue;
    }
    if (!continues) found.push(...moments(text.slice(from, match.index).replace(OPENING, "")));
    else found.push({ kind: "text", text: " " });
    previous = match.index + match[0].length;
    from = previous + (CLOSING.exec(text.slice(previous, previous + 24))?.[0].length ?? 0);
    const [start, end] = [toSeconds(match[1]), toSeconds(match[2])];
    if (start <= end) found.push({ kind: "interval", start, end, label: "" });
    else found.push({ kind: "text", text: match[0] });
  }
  found.push(...moments(text.slice(from)));
  return found;
}

/** Text with the single times in it. */
function moments(text) {
  const clean = text.replaceAll(LABELS, "");
  const found = [];
  let from = 0;
  for (const match of clean.matchAll(MOMENT)) {
    const at = toSeconds(match[0].replace(/ ?s[a-z]*$/, ""));
    if (at === null) continue;
    found.push({ kind: "text", text: clean.slice(from, match.index) }, { kind: "moment", text: match[0], at });
    from = match.index + match[0].length;
  }
  found.push({ kind: "text", text: clean.slice(from) });
  return found;
}

/** Gives each interval the words after its list up to the end of the phrase, as in "[[2, 3]] a red circle; ...". */
function withLabels(found) {
  let label = "";
  for (let i = found.length - 1; i >= 0; i--) {
    const piece = found[i];
    if (piece.kind === "interval") piece.label = label;
    else if (piece.kind === "text" && piece.text.trim()) {
      const names = /^ {0,2}[\p{L}\p{N}]/u.test(piece.text);
      label = names ? piece.text.split(/[;\n.]/, 1)[0].trim().slice(0, MAX_LABEL) : "";
    } else if (piece.kind !== "text") label = "";
  }
  return found;
}
