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

/** A share between 0 and 1, or null. */
export function share(value) {
  return finite(value) && value >= 0 && value <= 1 ? value : null;
}

/** A subtitle line `{start, end, text}`, or null. */
export function line(value) {
  if (amount(value?.start) === null || amount(value?.end) === null || typeof value.text !== "string") return null;
  return { start: value.start, end: Math.max(value.start, value.end), text: words(value.text, 500) };
}

/**
 * Moments as the page shows them: `{id, rank, start, end, probability, checked, refined, onCut, file, subtitle, label}`.
 * What the server did not say is null.
 */
export function moments(value) {
  return list(value, MAX_INTERVALS)
    .filter((moment) => amount(moment?.start) !== null && finite(moment.end) && moment.end >= moment.start)
    .map((moment, i) => ({
      id: words(moment.id, 100) || `m${i + 1}`,
      rank: Number.isInteger(moment.rank) && moment.rank > 0 ? moment.rank : i + 1,
      start: moment.start,
      end: moment.end,
      probability: share(moment.probability),
      checked: ["twice", "no", "failed"].includes(moment.checked) ? moment.checked : null,
      refined: moment.refined !== false,
      onCut: ["start", "end", "both"].includes(moment.on_cut) ? moment.on_cut : null,
      file: words(moment.file, 300) || null,
      name: words(moment.name, 500) || null,
      subtitle: line(moment.subtitle),
      label: "",
    }));
}

/** A video of the library: `{id, name, state, reason, duration, searchable, bytes}`, or null. */
export function entry(value) {
  const [id, name] = [words(value?.id, 100), words(value?.name, 500)];
  const states = ["discovered", "indexing", "indexed", "failed"];
  if (!id || !name || !states.includes(value.state)) return null;
  return {
    id, name, state: value.state, reason: words(value.reason, 500), duration: amount(value.duration),
    searchable: amount(value.searchable), bytes: amount(value.bytes) ?? 0,
  };
}

/** The moments of plain intervals: nothing is known of them but their times and the words that name them. */
export function momentsOf(pairs, labelled) {
  const same = ([start, end]) => labelled.find((piece) => piece.start === start && piece.end === end);
  return moments(pairs.map(([start, end]) => ({ start, end })))
    .map((moment, i) => ({ ...moment, label: same(pairs[i])?.label ?? "" }));
}

/** What a search looked at: `{duration, seen: [{start, end, spacing, close}], unseen: [[start, end]], ...}`, or null. */
export function coverage(value) {
  const duration = amount(value?.duration);
  if (duration === null) return null;
  return {
    duration,
    seen: list(value.seen, MAX_FRAMES)
      .filter((span) => amount(span?.start) !== null && finite(span.end) && amount(span.spacing) !== null)
      .map(({ start, end, spacing, close }) => ({ start, end, spacing, close: close === true })),
    unseen: intervals(value.unseen),
    places: amount(value.places),
    frames: amount(value.frames),
    indexTokens: amount(value.index_tokens),
    queryTokens: amount(value.query_tokens),
    share: share(value.share),
  };
}

/** Notes as `{code, text, place}`, from objects or plain sentences. */
export function notes(value) {
  return list(value, 20)
    .map((note) => (typeof note === "string" ? { text: note } : note))
    .filter((note) => typeof note?.text === "string" && note.text.trim())
    .map(({ code, text, place }) => ({ code: words(code, 40), text: words(text, 500), place: words(place, 40) }));
}

/** `{stage, done, total, unit, left}` of a search, or null. */
export function searchProgress(value) {
  if (!["index", "coarse", "close", "verify"].includes(value?.stage)) return null;
  const total = amount(value.total) ?? 0;
  const done = Math.min(amount(value.done) ?? 0, total);
  return { stage: value.stage, done, total, unit: words(value.unit, 20), left: amount(value.seconds_left) };
}

/** Seconds by stage of the work, as `[name, seconds]`. */
export function durations(value) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return [];
  return Object.entries(value).filter(([, seconds]) => amount(seconds) !== null).slice(0, 12);
}

/** The model of `/v1/models` as far as the page speaks of it; parts that the server does not name are empty. */
export function model(value) {
  const { scope, capabilities, measured_frames: measured, context, examples, known_models: known } = value?.keye ?? {};
  return {
    id: words(value?.id),
    context: amount(context),
    short: words(scope?.short, 40),
    text: words(scope?.text, 500),
    can: sentences(scope?.can),
    cannot: sentences(scope?.cannot),
    measured: amount(measured) ?? amount(scope?.frames),
    capabilities: sentences(capabilities),
    // What ends with a question mark is asked; anything else is an event to find.
    examples: sentences(scope?.examples?.length ? scope.examples : examples).slice(0, 4)
      .map((text) => ({ mode: text.endsWith("?") ? "ask" : "find", text })),
    known: list(known, 20).filter((entry) => words(entry?.name)).map((entry) => ({
      name: words(entry.name, 60), hub: words(entry.hub_name, 120), bytes: amount(entry.bytes), fits: entry.fits === true,
    })),
  };
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
