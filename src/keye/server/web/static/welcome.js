/** The desk with nothing open: the sample with questions that load and ask in one press, and what the model can do. */

import { byId, button, copyText, element } from "./dom.js";
import { icon } from "./icons.js";
import { conversations } from "./history.js";
import { model } from "./model.js";
import { toast } from "./notices.js";
import { bytes, said, t, when } from "./strings.js";

const LATEST = 3;

/** `handlers`: `sample(example or null)`, `reopen(conversation)`. */
export function startWelcome(handlers) {
  const draw = () => {
    const kept = conversations().filter(({ media }) => media.length).slice(0, LATEST);
    byId("try").replaceChildren(...(kept.length ? latest(kept, handlers) : sample(handlers)));
    byId("about").replaceChildren(...about());
  };
  for (const type of ["language", "model", "conversations"]) document.addEventListener(type, draw);
  draw();
}

function sample(handlers) {
  const examples = model()?.examples ?? [];
  const left = element("div", {}, element("h2", { text: t("empty.sample") }), element("p", { class: "soft", text: t("empty.sample.text") }),
    button(t("empty.watch"), () => handlers.sample(null), { icon: "play", id: "sample" }));
  const right = element("div", { class: "examples" }, ...examples.map((example) => {
    const node = button("", () => handlers.sample(example));
    node.append(element("span", { class: "chip tint", text: t(`mode.${example.mode}`) }), said(example.text));
    return node;
  }));
  return [left, right];
}

/** With no file open, the last three stand where the sample stands at first. */
function latest(kept, handlers) {
  const rows = kept.map((conversation) => {
    const node = button("", () => handlers.reopen(conversation), { icon: "file" });
    const name = conversation.media.map((medium) => medium.name).join(", ");
    node.append(element("span", { class: "cut-text", text: name, title: name }), element("span", { class: "space" }),
      element("span", { class: "soft", text: when(conversation.created) }));
    return node;
  });
  const left = element("div", {}, element("h2", { text: t("empty.latest") }),
    button(t("empty.sample.short"), () => handlers.sample(null), { icon: "play", id: "sample" }));
  return [left, element("div", { class: "examples" }, ...rows)];
}

function about() {
  const loaded = model();
  if (!loaded) return [];
  const parts = [];
  if (loaded.text || loaded.can.length) {
    const line = (kind, text) => element("li", { class: kind ? "can" : "soft" }, icon(kind ? "check" : "close"), said(text));
    parts.push(element(
      "section", {}, element("h2", { text: t("about.title", { model: loaded.id }) }), element("p", { text: said(loaded.text) }),
      element("ul", {}, ...loaded.can.map((text) => line(true, text)), ...loaded.cannot.map((text) => line(false, text))),
    ));
  }
  if (loaded.short && loaded.known.length) parts.push(element("section", {}, ...larger(loaded)));
  const tip = (name, text) => element("li", { class: "soft" }, icon(name), text);
  parts.push(element("section", {}, element("h2", { text: t("about.good") }),
    element("ul", {}, tip("keys", t("about.keys")), tip("eye", t("about.rests")))));
  return parts;
}

/** Which other models fit this machine and how to start one; the server says it only to callers that may know. */
export function larger({ known, id }) {
  const others = known.filter(({ name }) => !id.includes(name) && name !== "nano");
  const fitting = others.find(({ fits }) => fits) ?? others[0];
  if (!fitting) return [];
  const rows = others.map(({ name, hub, bytes: size, fits }) => element(
    "li", { class: "option" },
    element("div", {}, element("b", { text: hub.split("/").pop() || name }),
      element("span", { class: "hint", text: size === null ? "" : bytes(size) })),
    fits ? element("span", { class: "chip tint" }, icon("check"), t("about.fits"))
      : element("span", { class: "chip warn", text: t("about.large") }),
  ));
  const command = `keye serve ${fitting.name}`;
  const copy = button(t("copy"), async () => toast(t((await copyText(command)) ? "copied" : "copy.not")), { icon: "copy" });
  return [
    element("h2", { text: t("about.own") }), element("p", { text: t("about.own.text") }),
    element("ul", { class: "options" }, ...rows),
    element("div", { class: "row command" }, element("code", { text: command }), element("span", { class: "space" }), copy),
  ];
}
