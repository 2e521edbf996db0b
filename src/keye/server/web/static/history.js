/**
 * Conversations kept in this browser: text and plans, never a video or picture. Bounded in number and in size.
 * Fires `conversations` on the document when they change.
 *
 * A conversation is `{id, created, title, media: [{id, name, kind, bytes, duration, ...}], turns: [...]}`.
 */

const STORE = "keye.history";
const MAX_CONVERSATIONS = 50;
const MAX_TURNS = 100;
const MAX_TEXT = 20_000;
/** Characters in all; browsers give an origin about five million. */
const MAX_ALL = 2_000_000;

/** All kept conversations, the latest first. */
export function conversations() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    const whole = (entry) => Array.isArray(entry?.turns) && Array.isArray(entry?.media);
    return Array.isArray(kept) ? kept.filter(whole) : [];
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return [];
  }
}

/** Keeps a conversation in the place of its earlier state. The oldest go where there is no room. */
export function keep(conversation) {
  const others = conversations().filter((other) => other.id !== conversation.id);
  write([bounded(conversation), ...others].slice(0, MAX_CONVERSATIONS));
}

export function forget(id) {
  write(conversations().filter((other) => other.id !== id));
}

export function forgetAll() {
  write([]);
}

export function newConversation() {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  return { id, created: Date.now(), title: "", media: [], turns: [] };
}

/** Fields of a turn that are kept as they are; texts are cut, evidence and requests are left out. */
const FIELDS = [
  "mode", "route", "at", "moments", "weaker", "presence", "threshold", "regions", "plan", "usage", "notes", "attention",
  "failed", "stopped", "isCut", "seconds", "durations", "media",
];
const MAX_SPANS = 500;

function bounded(conversation) {
  const cut = (text) => (typeof text === "string" ? text.slice(0, MAX_TEXT) : "");
  const turns = conversation.turns.slice(-MAX_TURNS).map((turn) => ({
    ...Object.fromEntries(FIELDS.map((name) => [name, turn[name]])),
    question: cut(turn.question), answer: cut(turn.answer), reasoning: cut(turn.reasoning), note: cut(turn.note),
    coverage: turn.coverage?.seen.length <= MAX_SPANS ? turn.coverage : null, isDone: true,
  }));
  const media = conversation.media
    .map(({ id, name, kind, bytes, duration, fps, width, height }) => ({ id, name, kind, bytes, duration, fps, width, height }));
  const { id, created, title } = conversation;
  return { id, created, title: cut(title).slice(0, 120), media, turns };
}

function write(list) {
  store(list);
  document.dispatchEvent(new Event("conversations"));
}

function store(list) {
  for (let kept = list; kept.length; kept = kept.slice(0, -1)) {
    const text = JSON.stringify(kept);
    if (text.length > MAX_ALL && kept.length > 1) continue;
    try {
      localStorage.setItem(STORE, text);
      return;
    } catch (error) {
      // The browser gives less room than usual, or none as in some private windows: keep fewer, at last none.
      if (!(error instanceof DOMException)) throw error;
    }
  }
  if (!list.length) localStorage.removeItem(STORE);
}
