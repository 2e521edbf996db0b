/** The line above the player: what is open, what is known of it, other files, and what is under way with their upload. */

import { explain } from "./api.js";
import { button, byId, element, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { isAble } from "./model.js";
import { attachMenu } from "./menu.js";
import { noteBox } from "./notes.js";
import { bytes, left, plural, t, time } from "./strings.js";

export class FileBar {
  /** `handlers`: `open(item)`, `remove(item)`, `retry(item)`, `link()`, `scenes()`, `close()`, `add()`, `choose()`. */
  constructor(media, handlers) {
    this.media = media;
    this.handlers = handlers;
    attachMenu(byId("file-more"), () => t("file.more"), () => [
      { text: t("file.add"), icon: "plus", act: () => handlers.add() },
      { text: t("link.copy.file"), icon: "link", act: () => handlers.link() },
      ...(isAble("scenes") && this.media.video?.id ? [{ text: t("scenes.find"), icon: "mark", act: () => handlers.scenes() }] : []),
      null,
      { text: t("file.close"), icon: "close", act: () => handlers.close() },
    ]);
  }

  draw(item, plan) {
    const { items } = this.media;
    byId("file-name").replaceChildren(...(item ? [this.#name(item, items)] : []));
    const length = item?.duration ? time(item.duration, item.duration < 600 ? 1 : 0) : "";
    const size = item?.width ? `${item.width} × ${item.height}` : "";
    byId("file-facts").textContent = [length, size].filter(Boolean).join(" · ");
    byId("file-chips").replaceChildren(...this.#chips(item, plan));
    byId("file-states").replaceChildren(...items.flatMap((each) => this.#state(each)));
  }

  /** The name; a menu with a row a file where there are several. */
  #name(item, items) {
    if (items.length < 2) return element("span", { text: item.name, title: item.name });
    const opener = button(item.name, () => {}, { class: "quiet", title: item.name });
    opener.append(icon("down"));
    const files = items.map((each) => ({
      text: each.name, checked: each === item, act: () => this.handlers.open(each),
    }));
    const removals = items.map((each) => ({
      text: t("file.remove", { name: each.name }), icon: "close", act: () => this.handlers.remove(each),
    }));
    return attachMenu(opener, () => t("file.files"), () => [...files, null, ...removals]);
  }

  #chips(item, plan) {
    const spacing = plan?.timestamps?.length > 1 ? plan.timestamps[1] - plan.timestamps[0] : null;
    if (!spacing || item?.kind !== "video") return [];
    const text = { 0.5: t("seen.half"), 1: t("seen.second") }[spacing.toFixed(1) * 1];
    return text ? [element("span", { class: "chip" }, icon("check"), text)] : [];
  }

  #state(item) {
    if (item.error) return [this.#broken(item)];
    if (item.id === null) return [this.#upload(item)];
    if (item.strange) return [noteBox("", "", t("file.noplay"))];
    return [];
  }

  #broken(item) {
    const sentence = item.file ? explain(item.error).filter(Boolean).join(" ") : t("file.gone");
    const box = noteBox("wrong", t("file.broken", { name: item.name }), sentence);
    const retry = item.file && button(t("again"), () => this.handlers.retry(item), { icon: "again" });
    return element("div", {}, box, element("div", { class: "row" }, ...[
      button(t("file.choose"), () => this.handlers.choose()), retry || null,
      button(t("remove"), () => this.handlers.remove(item), { class: "quiet" }),
    ].filter(Boolean)));
  }

  /** Bytes sent and time left; once all are there, that the file is checked. */
  #upload(item) {
    const sent = item.share < 1;
    const rate = item.began && item.share > 0.02 ? ((performance.now() - item.began) / 1000) * (1 / item.share - 1) : null;
    const rest = rate !== null && (performance.now() - item.began) > 3000 ? left(rate) : "";
    const text = sent
      ? [t("upload", { done: bytes(item.share * item.bytes), total: bytes(item.bytes) }), rest].filter(Boolean).join(", ")
      : t("upload.check");
    const fill = element("span");
    fill.style.width = `${item.share * 100}%`;
    const bar = element("span", {
      class: "bar-box", role: "progressbar", "aria-label": t("upload.name", { name: item.name }),
      "aria-valuenow": Math.round(item.share * 100), "aria-valuemin": 0, "aria-valuemax": 100,
    }, fill);
    return element("div", {}, element("div", { class: "row" }, element("b", { text: item.name }),
      element("span", { class: "soft", text: bytes(item.bytes) })),
    element("div", { class: "row" }, bar, element("span", { class: "figure", text }),
      iconButton("close", t("upload.stop", { name: item.name }), () => this.handlers.remove(item), { class: "quiet" })));
  }
}

/** "3 files" where there are several, else the name. */
export function namesOf(media) {
  return media.length === 1 ? media[0].name : plural("files", media.length);
}
