/**
 * The player: plays a file of this machine from a local address, jumps, and says where it is.
 *
 * It knows neither marks nor answers. A format that the browser cannot play is said so; the server may still read it.
 */

import { byId } from "./dom.js";
import { clock } from "./times.js";

export class Player extends EventTarget {
  #video = byId("video");
  #toggle = byId("play");
  #mute = byId("mute");
  #time = byId("time");

  /** Fires `time` when the position changes, `ready` when the length is known, `unplayable` for a strange format. */
  constructor() {
    super();
    const video = this.#video;
    this.#toggle.addEventListener("click", () => this.toggle());
    video.addEventListener("click", () => this.toggle());
    this.#mute.addEventListener("click", () => (video.muted = !video.muted));
    byId("speed").addEventListener("change", (event) => (video.playbackRate = Number(event.target.value)));
    byId("fullscreen").addEventListener("click", () => this.#fullscreen());
    const on = (types, listener) => types.forEach((type) => video.addEventListener(type, listener));
    on(["play", "pause", "ended", "volumechange"], () => this.#showState());
    on(["timeupdate", "seeked"], () => this.#moved());
    video.addEventListener("loadedmetadata", () => {
      this.#moved();
      this.dispatchEvent(new Event("ready"));
    });
    video.addEventListener("error", () => {
      if (video.getAttribute("src")) this.dispatchEvent(new Event("unplayable"));
    });
    this.#followFrames();
  }

  get time() {
    return this.#video.currentTime;
  }

  get playing() {
    return !this.#video.paused && !this.#video.ended;
  }

  /** Seconds, or null as long as they are not known. */
  get duration() {
    return Number.isFinite(this.#video.duration) ? this.#video.duration : null;
  }

  load(url) {
    this.#video.src = url;
    this.#showState();
  }

  clear() {
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  seek(seconds) {
    const end = this.duration ?? seconds;
    this.#video.currentTime = Math.min(Math.max(0, seconds), end);
  }

  /** Plays from here and stops at `end` seconds, unless something else is done before. */
  async playUntil(end) {
    const video = this.#video;
    const watch = () => {
      const jumped = Math.abs(video.currentTime - last) > 1;
      last = video.currentTime;
      if (!jumped && last < end && !video.ended) return;
      video.removeEventListener("timeupdate", watch);
      if (!jumped && last >= end) video.pause();
    };
    let last = video.currentTime;
    if (video.paused) await this.toggle();
    if (!video.paused) video.addEventListener("timeupdate", watch);
  }

  async toggle() {
    if (!this.#video.paused) return this.#video.pause();
    try {
      await this.#video.play();
    } catch (error) {
      // A new source, a strange format or the browser's own rules stop a start; the state is shown as it is.
      if (!(error instanceof DOMException)) throw error;
    }
    this.#showState();
  }

  /** Between `timeupdate` events, four a second, the playhead would stutter; this follows every shown frame. */
  #followFrames() {
    const step = () => {
      if (!this.#video.paused) this.#moved();
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  #moved() {
    const text = `${clock(this.time)} / ${this.duration === null ? "?" : clock(this.duration)}`;
    if (this.#time.textContent !== text) this.#time.textContent = text;
    this.dispatchEvent(new Event("time"));
  }

  #showState() {
    const playing = !this.#video.paused && !this.#video.ended;
    this.#toggle.textContent = playing ? "Pause" : "Play";
    this.#mute.setAttribute("aria-pressed", String(this.#video.muted));
  }

  async #fullscreen() {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await this.#video.requestFullscreen?.();
  }
}
