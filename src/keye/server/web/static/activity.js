/** Activity: what runs, and the conversations that this browser keeps. */

import { byId, button, element, iconButton } from "./dom.js";
import { runningRows } from "./header.js";
import { conversations, forget, keep } from "./history.js";
import { toast } from "./notices.js";
import { runs } from "./runs.js";
import { plural, t, when } from "./strings.js";

/** `handlers`: `open(conversation)`. */
export function startActivity(handlers) {
  const draw = () => byId("activity").hidden || byId("activity").replaceChildren(...activity(handlers));
  for (const type of ["language", "runs", "conversations", "place"]) document.addEventListener(type, draw);
}

function activity(handlers) {
  const kept = conversations();
  const rows = kept.map((conversation) => row(conversation, handlers));
  return [
    element("h1", { text: t("place.activity") }),
    ...(runs().length ? [element("ul", { class: "list runs" }, ...runningRows())] : []),
    rows.length ? element("ul", { class: "list", id: "history-list" }, ...rows)
      : element("p", { class: "list nothing", id: "history-empty", text: t("activity.empty") }),
    element("p", { class: "hint", text: t("activity.kept") }),
  ];
}

function row(conversation, handlers) {
  const last = conversation.turns.at(-1);
  const name = conversation.title || t("activity.untitled");
  const files = conversation.media.map((medium) => medium.name).join(", ");
  const facts = [files, plural("answers", conversation.turns.length), last ? outcome(last) : ""].filter(Boolean).join(" · ");
  return element(
    "li", {},
    element("span", {}, element("span", { class: "chip tint", text: t(`mode.${last?.mode ?? "ask"}`) })),
    element("div", { class: "main" }, button(name, () => handlers.open(conversation), { class: "title" }),
      element("span", { class: "soft", text: facts })),
    element("span", { class: "soft figure", text: when(conversation.created) }),
    iconButton("close", t("activity.delete", { name }), () => {
      forget(conversation.id);
      toast(t("deleted"), () => keep(conversation));
    }, { class: "quiet" }),
  );
}

function outcome({ mode, moments, stopped, failed, weaker }) {
  if (failed) return t("outcome.failed");
  if (stopped) return t("outcome.stopped");
  if (mode === "ask") return t("outcome.answered");
  const found = plural("outcome.found", moments?.length ?? 0);
  return weaker?.length ? `${found}, ${plural("outcome.weak", weaker.length)}` : found;
}
