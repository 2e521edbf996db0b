/** The keys of the page. Single keys work outside fields and can be switched off under Settings. */

import { byId, element, isTyping } from "./dom.js";
import { setting } from "./store.js";
import { t } from "./strings.js";

/** What the table of keys shows, as keys and the name of a text. */
const TABLE = [
  ["Space  K", "play"], ["L", "faster"], ["J", "back"], ["←  →", "moments"], ["Shift ←  →", "seconds"], [",  .", "frame"],
  ["1 … 9", "rank"], ["[  ]   I  O", "range"], ["Backspace", "clear"], ["+  −  0  Z", "zoom"], ["/", "field"],
  ["Enter", "send"], ["Ctrl Enter", "other"], ["S", "save"], ["E", "why"], ["Y", "times"], ["Shift Y", "link"],
  ["X  Shift X", "choose"], ["C  M  F", "player"], ["T", "tab"], ["G  D L A S", "places"], ["Esc", "escape"],
];
const PLACES = { d: "desk", l: "library", a: "activity", s: "settings" };
/** Milliseconds between G and the letter of a place. */
const CHORD = 1500;

/** `actions`: a function by the names of `actionOf`, absent where it means nothing now; `go(place)`, `escape()`. */
export function startKeys(actions) {
  let chord = 0;
  byId("open-keys").addEventListener("click", showKeys);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") return void (document.querySelector(":popover-open") || actions().escape());
    if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey || !setting("singleKeys")) return;
    const place = performance.now() - chord < CHORD ? PLACES[event.key.toLowerCase()] : null;
    chord = event.key.toLowerCase() === "g" ? performance.now() : 0;
    const act = place ? () => actions().go(place) : actionOf(event, actions());
    if (!act) return;
    event.preventDefault();
    act();
  });
}

function actionOf(event, actions) {
  const onControl = event.target instanceof Element && event.target.closest("button, summary, a, [role=tab], [role=option]");
  if ((event.key === " " || event.key === "Enter") && onControl) return null;
  if (event.shiftKey && event.key === "ArrowLeft") return actions.seconds?.bind(null, -5);
  if (event.shiftKey && event.key === "ArrowRight") return actions.seconds?.bind(null, 5);
  if (event.shiftKey && event.key.toLowerCase() === "y") return actions.link;
  if (event.key === "?") return showKeys;
  if (/^[1-9]$/.test(event.key)) return actions.rank?.bind(null, Number(event.key));
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const bound = (name, ...values) => actions[name]?.bind(null, ...values);
  return {
    " ": bound("toggle"), k: bound("toggle"), l: bound("faster"), j: bound("seconds", -5),
    ArrowLeft: bound("moment", -1), ArrowRight: bound("moment", 1), ",": bound("frames", -1), ".": bound("frames", 1),
    "[": bound("range", 0), i: bound("range", 0), "]": bound("range", 1), o: bound("range", 1),
    Backspace: bound("clearRange"), "+": bound("zoom", 0.5), "=": bound("zoom", 0.5), "-": bound("zoom", 2),
    0: bound("seeAll"), z: bound("seeMoment"), "/": bound("field"), s: bound("save"), e: bound("why"), y: bound("times"),
    x: bound("choose", event.shiftKey), c: bound("captions"), m: bound("sound"), f: bound("full"), t: bound("tab"),
  }[key] ?? null;
}

export function showKeys() {
  const rows = TABLE.flatMap(([keys, name]) => [
    element("dt", {}, ...keys.split(/ +/).flatMap((key) => [element("kbd", { text: key }), " "])),
    element("dd", { text: t(`keys.${name}`) }),
  ]);
  byId("keys-list").replaceChildren(...rows);
  byId("keys").showModal();
}
