/** The field below the tabs: Find or Ask, the question, and the range that it is about. Fires `send` on itself. */

import { byId } from "./dom.js";
import { icon } from "./icons.js";
import { noteBox } from "./notes.js";
import { button } from "./dom.js";
import { set, setting } from "./store.js";
import { t, time } from "./strings.js";

const phone = window.matchMedia("(max-width: 860px)");

export class Composer extends EventTarget {
  #field = byId("question");
  #subject = null;

  /** `subject()` returns `{kind, isBeyond, frames, model, hasSubtitles}` of what is open. */
  constructor(subject) {
    super();
    this.#subject = subject;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(this.mode);
    });
    this.#field.addEventListener("keydown", (event) => {
      // Enter that ends the writing of an input method is not a wish to send.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      const other = this.mode === "find" ? "ask" : "find";
      this.#send(event.ctrlKey || event.metaKey ? other : this.mode);
    });
    for (const choice of document.querySelectorAll("input[name=mode]")) {
      choice.addEventListener("change", () => {
        set(this.#subject().kind === "video" ? "videoMode" : "otherMode", choice.value);
        this.draw();
      });
    }
    phone.addEventListener("change", () => this.draw());
    document.addEventListener("language", () => this.draw());
  }

  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  set mode(mode) {
    document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
    this.draw();
  }

  get text() {
    return this.#field.value.trim();
  }

  set text(text) {
    this.#field.value = text;
  }

  /** Chooses the mode that was last used for what is open. */
  open() {
    this.mode = setting(this.#subject().kind === "video" ? "videoMode" : "otherMode");
  }

  focus({ select = false } = {}) {
    this.#field.focus();
    if (select) this.#field.select();
  }

  /** The field takes the focus by itself only where no keyboard of the screen would hide the video. */
  welcome() {
    if (!window.matchMedia("(pointer: coarse), (max-height: 500px)").matches) this.focus();
  }

  /** Whether something keeps the question from being sent; pressing Send then shows what. */
  block(isBlocked) {
    byId("send").setAttribute("aria-disabled", String(isBlocked));
  }

  showRange([start, end]) {
    const isOpen = start === null && end === null;
    byId("range-chip").hidden = isOpen;
    byId("range-text").textContent = isOpen
      ? ""
      : t("range.chip", { start: time(start ?? 0), end: end === null ? t("next.end.open") : time(end) });
  }

  draw() {
    const { kind, isBeyond, frames, model, hasSubtitles } = this.#subject();
    const { mode } = this;
    const send = byId("send");
    send.replaceChildren(...(phone.matches ? [icon("up")] : [t(`mode.${mode}`)]));
    send.setAttribute("aria-label", t(`mode.${mode}`));
    const place = mode === "find" ? (hasSubtitles ? "find.placeholder.subtitles" : "find.placeholder") : `ask.placeholder.${kind ?? "video"}`;
    this.#field.placeholder = t(place);
    const note = byId("beyond");
    note.hidden = !(mode === "ask" && isBeyond);
    if (note.hidden) return;
    const box = noteBox("warn", "", t("beyond", { model, frames }), button(t("beyond.find"), () => {
      this.mode = "find";
      this.focus();
    }, { class: "link" }));
    note.replaceChildren(...box.childNodes);
  }

  #send(mode) {
    if (this.text) this.dispatchEvent(new CustomEvent("send", { detail: { question: this.text, mode } }));
  }
}
