/**
 * What is looked at: the player or picture and the timeline, kept in step with each other and with the chosen answer.
 *
 * It shows media and turns; it asks nothing and keeps nothing.
 */

import { byId, element } from "./dom.js";
import { Player } from "./player.js";
import { isAble } from "./model.js";
import { RegionOverlay } from "./regions.js";
import { paint, ServerSource, Thumbnails, VideoSource } from "./thumbnails.js";
import { Timeline } from "./timeline.js";
import { percent, number, setHours, t, time } from "./strings.js";

/** Pixels of the height of a picture that stands in the place of the player. */
const STILL_HEIGHT = 480;

export class Stage extends EventTarget {
  player = new Player();
  timeline = new Timeline();
  thumbnails = null;
  #overlay = new RegionOverlay();
  #item = null;
  #turn = null;
  #waits = null;
  /** What draws large pictures of a video that the browser cannot play, and the time of the one that is drawn. */
  #still = null;
  #stillAt = null;

  /** Fires `ready` when the length of what is open is known, and `unplayable`. */
  constructor() {
    super();
    const { player, timeline } = this;
    player.addEventListener("time", () => {
      timeline.moveTo(player.time);
      if (this.#still) this.#drawStill();
    });
    player.addEventListener("ready", () => this.#measured(player.duration, new VideoSource(this.#item.url)));
    player.addEventListener("unplayable", () => this.#strange());
    timeline.addEventListener("jump", (event) => this.jump(event.detail));
    timeline.addEventListener("choose", (event) => this.jump(event.detail.start));
    timeline.addEventListener("step", (event) => this.step(event.detail));
    timeline.addEventListener("hover", (event) => this.#hover(event.detail));
  }

  get item() {
    return this.#item;
  }

  get turn() {
    return this.#turn;
  }

  jump(seconds) {
    this.player.seek(seconds);
    this.timeline.reveal(seconds);
    this.timeline.moveTo(seconds);
  }

  /** Moves by frames of the video. */
  step(frames) {
    this.jump(Math.max(0, this.player.time + frames / (this.#item?.fps || 25)));
  }

  /** Plays a moment from its start to its end. */
  play({ start, end }) {
    this.jump(start);
    this.player.playUntil(end);
  }

  /** Shows a turn's moments, evidence and places; null for none. */
  show(turn) {
    this.#turn = turn;
    const { moments, weaker } = split(turn);
    const evidence = evidenceOf(turn, this.#item);
    this.timeline.show({ moments, weaker, evidence, coverage: turn?.coverage ?? null });
    this.#overlay.show(turn?.regions ?? []);
    this.#drawLegend([...moments, ...weaker], evidence, turn?.coverage);
  }

  /** Shows a turn whose answer has just come: the player at the first moment, which takes a tenth of the timeline. */
  present(turn) {
    this.show(turn);
    const [first] = turn.moments ?? [];
    if (!first) return;
    if (!this.player.playing) this.jump(first.start);
    this.timeline.seeMoment(first);
  }

  chooseRegion(index) {
    this.#overlay.choose(index);
  }

  /** Opens a medium; null for none. */
  open(item) {
    this.#item = item;
    this.thumbnails?.close();
    this.thumbnails = null;
    const isVideo = item?.kind === "video";
    byId("player").hidden = !isVideo;
    byId("controls").hidden = !isVideo;
    byId("picture").hidden = !item || isVideo || !item.url;
    byId("still").hidden = true;
    this.#still = null;
    this.timeline.reset(0, null);
    if (isVideo && item.url) this.player.load(item.url);
    else this.player.clear();
    if (item?.kind === "image" && item.url) Object.assign(byId("image"), { src: item.url, alt: item.name });
    if (item) item.strange = false;
    // A kept video has no address until the server has said that it is still there.
    if (isVideo && !item.url && !item.isComing) this.#strange();
  }

  /** Where the player should stand as soon as it can. */
  startAt(seconds) {
    if (this.timeline.duration > 0) this.jump(seconds);
    else this.#waits = seconds;
  }

  /** Takes up what the server said about the open medium, where the browser could not tell. */
  refresh() {
    if (this.#item?.strange && this.#item.duration && !this.timeline.duration) this.#strange();
  }

  #measured(duration, source) {
    setHours(duration);
    this.thumbnails?.close();
    this.thumbnails = source ? new Thumbnails(source, () => this.timeline.drawThumbs()) : null;
    this.timeline.reset(duration, this.thumbnails);
    this.show(this.#turn);
    if (this.#waits !== null) this.jump(this.#waits);
    this.#waits = null;
    this.dispatchEvent(new Event("ready"));
  }

  #strange() {
    const item = this.#item;
    item.strange = true;
    byId("player").hidden = true;
    this.dispatchEvent(new Event("unplayable"));
    if (!item.duration || !item.id) return;
    const source = isAble("frames") ? new ServerSource(item) : null;
    this.player.standIn(item.duration);
    this.#measured(item.duration, source);
    this.#still = source;
    if (source) this.#drawStill();
  }

  /** Draws the picture at the head in the place of the player; of those asked for meanwhile only the last. */
  async #drawStill() {
    if (this.#stillAt !== null) return;
    const [source, at] = [this.#still, this.player.time];
    this.#stillAt = at;
    const [picture] = await source.draw([at], STILL_HEIGHT);
    this.#stillAt = null;
    if (source !== this.#still) return;
    if (picture) {
      byId("player").hidden = byId("still").hidden = false;
      Object.assign(byId("still"), { width: picture.width, height: picture.height });
      paint(picture, byId("still"));
    }
    if (this.player.time !== at) this.#drawStill();
  }

  #hover({ time: at, x }) {
    const preview = byId("preview");
    preview.hidden = at === null;
    if (at === null) return;
    const box = byId("timeline").getBoundingClientRect();
    const half = preview.offsetWidth / 2;
    preview.style.left = `${Math.min(box.width - half, Math.max(half, x - box.left))}px`;
    byId("preview-text").textContent = [time(at), this.describe(at)].filter(Boolean).join(" · ");
    const canvas = byId("preview-canvas");
    canvas.hidden = !this.thumbnails?.aspect;
    if (canvas.hidden) return;
    const height = Math.round(canvas.width / Math.min(4, Math.max(0.75, this.thumbnails.aspect)));
    if (canvas.height !== height) canvas.height = height;
    this.thumbnails.request(at, canvas, { first: true });
  }

  /** How much of the attention the frame at a time got, as a sentence; "" where nothing is known. */
  describe(at) {
    let best = null;
    for (const frame of evidenceOf(this.#turn, this.#item) ?? []) {
      if (!best || Math.abs(frame.time - at) < Math.abs(best.time - at)) best = frame;
    }
    if (!best) return "";
    const share = percent(best.share, best.share < 0.1 ? 1 : 0);
    return best.lift === null ? t("evidence.at", { share }) : t("evidence.at.lift", { share, lift: number(best.lift, 1) });
  }

  #drawLegend(moments, evidence, coverage) {
    const parts = [];
    if (coverage) {
      const states = new Set(moments.map(({ state, checked }) => (checked === null ? "" : state)));
      if (states.has("solid")) parts.push(["", "checked.twice"]);
      if (states.has("hollow")) parts.push(["hollow", "checked.no"]);
      if (states.has("dot")) parts.push(["dot", "moments.weak"]);
      parts.push(["thin", "seen.thin"], ["thick", "seen.thick"]);
      if (coverage.unseen.length) parts.push(["unseen", "seen.not"]);
    } else if (evidence?.length) parts.push(["bar", "evidence.legend"]);
    const entry = ([kind, key]) => element("span", {}, element("i", { class: kind }), t(key));
    byId("legend").replaceChildren(...parts.map(entry));
  }
}

/** Moments and weaker ones of a turn with the `state` in which the timeline draws them. */
export function split(turn) {
  const state = ({ checked }) => (checked === "no" ? "hollow" : "solid");
  return {
    moments: (turn?.moments ?? []).map((moment) => ({ ...moment, state: state(moment) })),
    weaker: (turn?.weaker ?? []).map((moment) => ({ ...moment, state: "dot" })),
  };
}

/** The frames `{time, share, lift}` of the medium that an answer looked at, or null. */
export function evidenceOf(turn, item) {
  const media = turn?.evidence ?? [];
  const at = Math.max(0, (turn?.media ?? []).indexOf(item?.id));
  return media[media.length > at ? at : 0]?.frames ?? null;
}
