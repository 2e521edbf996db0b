/**
 * Data of the server made safe to draw: numbers are finite and in range, lists are bounded, text is text.
 *
 * A model, a broken server or an attacker may send anything. Pure functions.
 */

const MAX_INTERVALS = 500;
const MAX_FRAMES = 20_000;
const MAX_REGIONS = 200;
const MAX_CORNERS = 500;
const SCALE = 1000;
const KINDS = new Set(["point", "box", "quad", "polygon"]);
const MAX_MEDIA = 16;
const PHASES = ["media", "encode", "prefill"];

function list(value, most) {
  return Array.isArray(value) ? value.slice(0, most) : [];
}

function finite(value) {
  return typeof value === "number" && Number.isFinite(value);
}

export function words(value, most = 300) {
  return typeof value === "string" ? value.slice(0, most) : "";
}

/** Sentences, at most 20 of them. */
export function sentences(value) {
  return list(value, 20).filter((one) => typeof one === "string" && one.trim()).map((one) => words(one, 500));
}

/** A count or a length that is drawn, or null. */
export function amount(value) {
  return finite(value) && value >= 0 ? value : null;
}

/** `[[start, end], ...]` in seconds, 0 <= start < end: without those of no length. */
export function intervals(value) {
  return list(value, MAX_INTERVALS)
    .filter((pair) => Array.isArray(pair) && finite(pair[0]) && finite(pair[1]) && pair[0] >= 0 && pair[0] < pair[1])
    .map(([start, end]) => [start, end]);
}

/** Places in a picture: `{kind, points, label}`, corners in thousandths of its width and height. */
export function regions(value) {
  return list(value, MAX_REGIONS)
    .filter((region) => KINDS.has(region?.kind))
    .map((region) => ({
      kind: region.kind,
      label: words(region.label, 80),
      points: list(region.points, MAX_CORNERS).filter(
        (point) => Array.isArray(point) && point.length === 2 && point.every((n) => finite(n) && n >= 0 && n <= SCALE),
      ),
    }))
    .filter((region) => region.points.length > 0);
}

/**
 * Evidence of an answer as a list with one `{frames: [{time, share, lift}], top: [time, ...], reason}` per medium, or
 * one with the reason why there is none. Frames are sorted by time; those whose time or share is not a number are left
 * out, a share is held between 0 and 1, and `lift` may be null.
 */
export function evidence(value) {
  const reason = words(value?.reason);
  const media = list(value?.media, MAX_MEDIA).map((medium) => ({ ...mediumEvidence(medium), reason }));
  return media.length ? media : [{ frames: [], top: [], reason }];
}

function mediumEvidence(value) {
  const shares = list(value?.shares, MAX_FRAMES);
  const lifts = list(value?.lifts, MAX_FRAMES);
  const all = list(value?.times, MAX_FRAMES).map((time, i) => ({
    time,
    share: finite(shares[i]) ? Math.min(1, Math.max(0, shares[i])) : null,
    lift: finite(lifts[i]) && lifts[i] >= 0 ? lifts[i] : null,
  }));
  const usable = (frame) => frame && amount(frame.time) !== null && frame.share !== null;
  const top = list(value?.top, 5).map((index) => all[index]).filter(usable).map((frame) => frame.time);
  return { frames: all.filter(usable).sort((a, b) => a.time - b.time), top };
}

/** `{phase, done, total}` of a progress event, or null. */
export function progress(value) {
  if (!PHASES.includes(value?.phase)) return null;
  const total = amount(value.total) ?? 0;
  return { phase: value.phase, done: Math.min(amount(value.done) ?? 0, total), total };
}

/** The plan of one medium, as far as it is shown. */
export function plan(value) {
  return {
    kind: value?.kind === "image" ? "image" : "video",
    frames: amount(value?.frames) ?? 1,
    timestamps: list(value?.timestamps, MAX_FRAMES).filter((time) => amount(time) !== null),
    width: amount(value?.width),
    height: amount(value?.height),
    tokens: amount(value?.visual_tokens) ?? 0,
    notes: sentences(value?.notes),
  };
}

export function plans(value) {
  return list(value, 64).map(plan);
}
