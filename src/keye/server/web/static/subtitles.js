/** Subtitles beside the player: lines, a search in them, the line on the video, and what a search takes of them. */

import { subtitles as read } from "./api.js";
import * as data from "./data.js";
import { byId, button, element, iconButton } from "./dom.js";
import { isAble } from "./model.js";
import { setTab } from "./panel.js";
import { number, plural, t, time } from "./strings.js";

const MOST_LINES = 20_000;

export class Subtitles {
  #stage;
  #lines = [];
  #tracks = [];
  #track = null;
  #item = null;
  #query = "";
  #matches = [];
  #match = 0;
  #rows = [];
  #now = -1;
  #follows = true;
  #text = null;

  /** Fires `subtitles` on the document when there are others. */
  constructor(stage) {
    this.#stage = stage;
    stage.player.addEventListener("time", () => this.#moved());
    byId("captions").addEventListener("click", () => {
      const isOn = byId("captions").getAttribute("aria-pressed") !== "true";
      byId("captions").setAttribute("aria-pressed", String(isOn));
      this.#caption();
    });
    for (const type of ["wheel", "touchmove"]) {
      byId("panel-subtitles").addEventListener(type, () => this.#follow(false), { passive: true });
    }
    document.addEventListener("language", () => this.#draw());
  }

  get isThere() {
    return this.#lines.length > 0;
  }

  /** What a search reads: a track, the text of a file, or null for what the server chooses. */
  get choice() {
    if (this.#text !== null) return { text: this.#text };
    return this.#track?.origin === "track" ? { track: this.#track.id } : null;
  }

  /** Takes up the subtitles of a video on the server; null for none. */
  async open(item) {
    this.#item = item;
    this.#text = null;
    this.#take(null);
    if (item?.kind === "video" && item.id && isAble("subtitles")) await this.#load(null);
  }

  /** Reads an SRT or WebVTT file of the user. */
  async addFile(file) {
    const text = await file.text();
    await this.#load({ text });
    this.#text = text;
  }

  async #load(choice) {
    const item = this.#item;
    const request = { ...(item?.id ? { video: { file_id: item.id } } : {}), ...(choice ? { subtitles: choice } : {}) };
    const result = await read(request);
    if (item === this.#item) this.#take(result);
  }

  #take(result) {
    const line = (value) => data.line(value);
    this.#lines = (Array.isArray(result?.lines) ? result.lines : []).slice(0, MOST_LINES).map(line).filter(Boolean);
    this.#tracks = Array.isArray(result?.tracks) ? result.tracks.slice(0, 50) : this.#tracks;
    this.#track = result?.track ?? null;
    [this.#query, this.#matches, this.#match, this.#now] = ["", [], 0, -1];
    setTab("subtitles", this.#lines.length ? "" : null);
    byId("captions").hidden = !this.#lines.length;
    this.#draw();
    document.dispatchEvent(new Event("subtitles"));
  }

  #draw() {
    const panel = byId("panel-subtitles");
    if (!this.#lines.length) {
      this.#stage.timeline.setSubtitles([]);
      return panel.replaceChildren();
    }
    this.#rows = this.#lines.map(({ start, text }) => element(
      "li", {},
      button(time(start, 0), () => this.#stage.jump(start), { class: "link figure" }), element("p", { text }),
    ));
    const follow = element("button", {
      type: "button", class: "switch", role: "switch", id: "follow", "aria-checked": String(this.#follows),
      "aria-labelledby": "follow-name", on: { click: () => this.#follow(!this.#follows) },
    });
    panel.replaceChildren(
      this.#finder(), element("ul", { class: "timed" }, ...this.#rows),
      element("div", { class: "row timed-foot" }, follow, element("span", { id: "follow-name", text: t("subtitles.follow") }),
        element("span", { class: "space" }), element("span", { class: "hint", text: this.#source() })),
    );
    this.#now = -1;
    this.#mark();
    return this.#moved();
  }

  #source() {
    const { language, origin } = this.#track ?? {};
    const from = ["file", "track", "speech"].includes(origin) ? t(`subtitles.${origin}`) : "";
    return [plural("lines", this.#lines.length), data.words(language, 20), from].filter(Boolean).join(", ");
  }

  #finder() {
    const field = element("input", {
      type: "search", value: this.#query, placeholder: t("subtitles.search"), "aria-label": t("subtitles.search"),
      on: { input: () => this.#search(field.value) },
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) this.#go(event.shiftKey ? -1 : 1);
    });
    const parts = [field, element("span", { class: "hint figure", id: "subtitle-count", role: "status" }),
      iconButton("left", t("subtitles.before"), () => this.#go(-1)), iconButton("right", t("subtitles.after"), () => this.#go(1))];
    if (this.#tracks.length > 1) {
      const name = (track) => [data.words(track.language, 20), data.words(track.name, 60)].filter(Boolean).join(", ") || track.id;
      parts.push(element("select", {
        "aria-label": t("subtitles.tracks"), on: { change: (event) => this.#load({ track: event.target.value }) },
      }, ...this.#tracks.map((track) => element("option", {
        value: track.id, text: name(track), selected: track.id === this.#track?.id,
      }))));
    }
    return element("div", { class: "finder" }, ...parts);
  }

  #search(query) {
    this.#query = query;
    this.#match = 0;
    this.#mark();
    if (this.#matches.length) this.#show(this.#matches[0]);
  }

  #go(direction) {
    if (!this.#matches.length) return;
    this.#match = (this.#match + direction + this.#matches.length) % this.#matches.length;
    this.#mark();
    this.#show(this.#matches[this.#match]);
    this.#stage.jump(this.#lines[this.#matches[this.#match]].start);
  }

  /** Marks the lines that hold what is searched, here and on the timeline. */
  #mark() {
    const words = this.#query.trim().toLowerCase();
    this.#matches = [];
    this.#lines.forEach(({ text }, i) => {
      const at = words ? text.toLowerCase().indexOf(words) : -1;
      if (at >= 0) this.#matches.push(i);
      const paragraph = this.#rows[i].lastChild;
      if (at < 0) {
        if (paragraph.childElementCount) paragraph.textContent = text;
        return;
      }
      const mark = element("mark", { text: text.slice(at, at + words.length) });
      paragraph.replaceChildren(text.slice(0, at), mark, text.slice(at + words.length));
    });
    const count = { at: number(this.#matches.length ? this.#match + 1 : 0), all: number(this.#matches.length) };
    document.getElementById("subtitle-count").textContent = words ? t("subtitles.count", count) : "";
    const found = new Set(this.#matches);
    this.#stage.timeline.setSubtitles(this.#lines.map((line, i) => ({ ...line, isMatch: found.has(i) })));
  }

  #show(i) {
    this.#rows[i]?.scrollIntoView({ block: "nearest" });
  }

  #follow(follows) {
    this.#follows = follows;
    document.getElementById("follow")?.setAttribute("aria-checked", String(follows));
    if (follows && this.#now >= 0) this.#show(this.#now);
  }

  #moved() {
    const at = this.#stage.player.time;
    const now = this.#lines.findLastIndex(({ start }) => start <= at + 0.01);
    if (now === this.#now) return this.#caption();
    this.#rows[this.#now]?.classList.remove("current");
    this.#now = now;
    this.#rows[now]?.classList.add("current");
    if (this.#follows && now >= 0 && !byId("panel-subtitles").hidden) this.#show(now);
    return this.#caption();
  }

  #caption() {
    const line = this.#lines[this.#now];
    const isShown = byId("captions").getAttribute("aria-pressed") === "true" && line && this.#stage.player.time <= line.end;
    byId("caption").hidden = !isShown;
    if (isShown && byId("caption").textContent !== line.text) byId("caption").textContent = line.text;
  }
}
