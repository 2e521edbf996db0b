/**
 * What is looked at: the player or picture, the timeline, the evidence and the list of media, kept in step.
 *
 * It shows media and turns; it asks nothing and keeps nothing.
 */

import { explain } from "./api.js";
import { button, byId, element, isTyping } from "./dom.js";
import { EvidenceStrip } from "./evidence.js";
import { Player } from "./player.js";
import { RegionOverlay } from "./regions.js";
import { Thumbnails } from "./thumbnails.js";
import { Timeline } from "./timeline.js";
import { clock, pieces } from "./times.js";

export class Stage {
  player = new Player();
  timeline = new Timeline();
  #evidence = new EvidenceStrip((time) => this.jump(time));
  #overlay = new RegionOverlay();
  #thumbnails = null;
  #shown = null;
  #turn = null;
  #preview = byId("preview");

  constructor(media) {
    this.media = media;
    media.addEventListener("change", () => this.#refresh());
    this.player.addEventListener("time", () => this.timeline.moveTo(this.player.time));
    this.player.addEventListener("ready", () => this.#measured(this.player.duration, true));
    this.player.addEventListener("unplayable", () => this.#unplayable());
    this.timeline.addEventListener("jump", (event) => this.jump(event.detail));
    this.timeline.addEventListener("view", (event) => this.#evidence.draw(event.detail));
    this.timeline.addEventListener("hover", (event) => this.#hover(event.detail));
    document.addEventListener("theme", () => this.#evidence.draw(this.timeline.view));
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  jump(seconds) {
    this.player.seek(seconds);
    this.timeline.reveal(seconds);
    this.timeline.moveTo(seconds);
  }

  /** Plays a moment from its start to its end. */
  playMoment([start, end]) {
    this.jump(start);
    this.player.playUntil(end);
  }

  /** Shows a turn's intervals, evidence and places; null for none. */
  show(turn) {
    this.#turn = turn;
    const labels = pieces(turn?.answer ?? "").filter((piece) => piece.kind === "interval");
    const label = ([start, end]) => labels.find((one) => one.start === start && one.end === end)?.label ?? "";
    const intervals = turn?.intervals ?? [];
    this.timeline.setIntervals(intervals.map(([start, end]) => ({ start, end, label: label([start, end]) })));
    const at = this.media.items.indexOf(this.media.video);
    const found = turn?.evidence ?? [];
    this.#evidence.show(found.length ? found[found.length === this.media.items.length ? Math.max(0, at) : 0] : null);
    this.#overlay.show(turn?.regions ?? []);
  }

  chooseRegion(index) {
    this.#overlay.choose(index);
  }

  /** Shows a medium large. */
  open(item) {
    this.#shown = item;
    this.#thumbnails?.close();
    this.#thumbnails = null;
    const video = item?.kind === "video";
    byId("player").hidden = !video;
    byId("picture").hidden = !item || video || !item.url;
    byId("strange").hidden = true;
    this.timeline.reset(0, null);
    this.timeline.setFrames([]);
    if (video && item.url) this.player.load(item.url);
    else this.player.clear();
    if (item?.kind === "image" && item.url) Object.assign(byId("image"), { src: item.url, alt: item.name });
    if (video && !item.url) this.#measured(item.duration ?? 0, false);
    this.#refresh();
  }

  #measured(duration, playable) {
    this.#thumbnails = playable ? new Thumbnails(this.#shown.url, () => this.timeline.drawThumbs()) : null;
    this.timeline.reset(duration, this.#thumbnails);
    this.show(this.#turn);
  }

  #unplayable() {
    byId("player").hidden = true;
    byId("strange").hidden = false;
    byId("strange").textContent = strangeText(this.#shown);
    if (this.#shown?.duration) this.#measured(this.#shown.duration, false);
  }

  #refresh() {
    const { items } = this.media;
    document.body.classList.toggle("empty", items.length === 0);
    if (!items.includes(this.#shown)) {
      if (this.#shown || items.length) this.open(items[0] ?? null);
      return;
    }
    if (!byId("strange").hidden) byId("strange").textContent = strangeText(this.#shown);
    const strange = !byId("strange").hidden || !this.#shown.url;
    if (this.#shown.kind === "video" && strange && this.#shown.duration && byId("timeline").hidden) {
      this.#measured(this.#shown.duration, false);
    }
    byId("tray").replaceChildren(...items.map((item) => this.#row(item)));
  }

  #row(item) {
    const state = stateOf(item);
    const length = item.duration ? ` · ${clock(item.duration)}` : "";
    const name = button(item.name, () => this.open(item), {
      class: "name", title: item.name, "aria-pressed": String(item === this.#shown),
    });
    const row = element("li", {}, name, element("span", { class: "state", text: `${size(item.bytes)}${length}` }));
    if (state) row.append(element("span", { class: item.error ? "state wrong" : "state", text: state }));
    if (!item.id && !item.error) {
      const value = item.share < 1 ? { value: item.share } : {};
      row.append(element("progress", { max: 1, ...value, "aria-label": item.share < 1 ? "Upload" : "Check" }));
    }
    if (item.error && item.file) row.append(button("Upload again", () => this.media.start(item)));
    const look = { "aria-label": `Remove ${item.name}`, class: "quiet" };
    row.append(button("Remove", () => this.media.remove(item), look));
    return row;
  }

  #hover({ time, x }) {
    this.#preview.hidden = time === null;
    if (time === null) return;
    const box = byId("timeline").getBoundingClientRect();
    const half = this.#preview.offsetWidth / 2;
    this.#preview.style.left = `${Math.min(box.width - half, Math.max(half, x - box.left))}px`;
    byId("preview-text").textContent = [clock(time), this.#evidence.describe(time)].filter(Boolean).join(" · ");
    const canvas = byId("preview-canvas");
    canvas.hidden = !this.#thumbnails?.aspect;
    if (canvas.hidden) return;
    const height = Math.round(canvas.width / Math.min(4, Math.max(0.75, this.#thumbnails.aspect)));
    if (canvas.height !== height) canvas.height = height;
    this.#thumbnails.request(time, canvas, { first: true });
  }

  // Keys that work wherever nothing is typed

  #key(event) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (isTyping(event.target) || document.querySelector("dialog[open]") || !this.media.video) return;
    const action = this.#action(event);
    if (!action) return;
    event.preventDefault();
    action();
  }

  #action(event) {
    const step = (direction) => () => {
      const target = this.timeline.neighbour(this.player.time, direction);
      if (target !== null) this.jump(target);
    };
    const move = (seconds) => () => this.jump(Math.max(0, this.player.time + seconds));
    const frame = 1 / (this.media.video.fps || 25);
    const onButton = event.target instanceof Element && event.target.closest("button, summary, a");
    if (event.key === " ") return onButton ? null : () => this.player.toggle();
    if (event.shiftKey && event.key === "ArrowLeft") return move(-5);
    if (event.shiftKey && event.key === "ArrowRight") return move(5);
    return {
      j: step(-1), ArrowLeft: step(-1), l: step(1), ArrowRight: step(1), k: () => this.player.toggle(),
      ",": move(-frame), ".": move(frame),
    }[event.key] ?? null;
  }
}

/** What is under way with a medium, or wrong with it: the server's own sentence. */
function stateOf(item) {
  if (item.error) return item.file ? explain(item.error).join(" ") : "not on the server";
  if (item.id) return "";
  return item.share < 1 ? `uploading ${Math.round(item.share * 100)} %` : "checking";
}

/** In place of the player: that the browser cannot play a video, which the server may read all the same. */
function strangeText(item) {
  if (item?.error) return stateOf(item);
  if (!item?.id) return "This browser cannot play this file. The server is asked whether it can read it.";
  return "This browser cannot play this format. keye can read it: ask as usual.";
}

function size(bytes) {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}
