/** Library: the files that the server holds. */

import { explain, files } from "./api.js";
import { byId, button, element } from "./dom.js";
import { amount, words } from "./data.js";
import { bytes, t, time, when } from "./strings.js";

let entries = null;
let problem = "";

/** `handlers`: `open(id)`, `add()`. */
export function startLibrary(handlers) {
  const draw = () => byId("library").hidden || byId("library").replaceChildren(...library(handlers));
  document.addEventListener("language", draw);
  document.addEventListener("place", async (event) => {
    if (event.detail.place !== "library") return;
    draw();
    try {
      [entries, problem] = [await files(), ""];
    } catch (error) {
      problem = explain(error).join(" ");
    }
    draw();
  });
}

function library(handlers) {
  const rows = (entries ?? []).map((entry) => row(entry, handlers)).filter(Boolean);
  const list = rows.length ? element("ul", { class: "list" }, ...rows)
    : element("p", { class: "list nothing", text: entries ? t("library.empty") : problem });
  return [
    element("div", { class: "row" }, element("h1", { text: t("place.library") }), element("span", { class: "space" }),
      button(t("library.add"), () => handlers.add(), { icon: "upload" })),
    list, element("p", { class: "hint", text: t("library.kept") }),
  ];
}

function row(entry, handlers) {
  const [id, name] = [words(entry?.id), words(entry?.filename)];
  if (!id) return null;
  const length = amount(entry.keye?.duration);
  const size = amount(entry.keye?.width) ? `${entry.keye.width} × ${entry.keye.height}` : "";
  const facts = [length === null ? "" : time(length, 0), size, bytes(amount(entry.bytes) ?? 0)].filter(Boolean).join(" · ");
  const created = amount(entry.created_at);
  return element(
    "li", {},
    element("span", {}, element("span", { class: "chip calm", text: t(entry.keye?.kind === "image" ? "kind.image" : "kind.video") })),
    element("div", { class: "main" }, button(name || id, () => handlers.open(id), { class: "title" }), element("span", { class: "soft figure", text: facts })),
    element("span", { class: "soft figure", text: created === null ? "" : when(created * 1000) }),
    element("span", {}),
  );
}
