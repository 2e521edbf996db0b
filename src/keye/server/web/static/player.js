/**
 * The player: plays a file from its address, jumps, and says where it is.
 *
 * It knows neither marks nor answers. A format that the browser cannot play is said so; the server may still read it.
 */

import { byId } from "./dom.js";
import { icon } from "./icons.js";
import { t, time } from "./strings.js";

const SPEEDS = [1, 2, 4];

export class Player extends EventTarget {
  #video = byId("video");
  #toggle = byId("play");
  #mute = byId("mute");
  #stillAt = null;
  #length = null;

  /** Fires `time` when the position changes, `ready` when the length is known, `unplayable` for a strange format. */
  constructor() {
    super();
    const video = this.#video;
    this.#toggle.addEventListener("click", () => this.toggle());
    video.addEventListener("click", () => this.toggle());
    this.#mute.addEventListener("click", () => this.toggleSound());
    byId("speed").addEventListener("change", (event) => (video.playbackRate = Number(event.target.value)));
    byId("fullscreen").addEventListener("click", () => this.fullscreen());
    const on = (types, listener) => types.forEach((type) => video.addEventListener(type, listener));
    on(["play", "pause", "ended", "volumechange"], () => this.#showState());
    on(["timeupdate", "seeked"], () => this.#moved());
    // What can be heard is known only once something was decoded.
    on(["loadeddata", "timeupdate"], () => (this.#mute.hidden = !hasSound(video)));
    video.addEventListener("loadedmetadata", () => {
      this.#moved();
      this.dispatchEvent(new Event("ready"));
    });
    video.addEventListener("error", () => {
      if (video.getAttribute("src")) this.dispatchEvent(new Event("unplayable"));
    });
    document.addEventListener("language", () => this.#showState());
    this.#followFrames();
  }

  get time() {
    return this.#stillAt ?? this.#video.currentTime;
  }

  get playing() {
    return !this.#video.paused && !this.#video.ended;
  }

  /** Seconds, or null as long as they are not known. */
  get duration() {
    if (this.#stillAt !== null) return this.#length;
    return Number.isFinite(this.#video.duration) ? this.#video.duration : null;
  }

  load(url) {
    this.#stillAt = null;
    this.#video.src = url;
    this.#showState();
  }

  clear() {
    this.#stillAt = null;
    this.#mute.hidden = true;
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  /** Stands for a video of `duration` seconds that is shown picture by picture instead of played. */
  standIn(duration) {
    [this.#stillAt, this.#length] = [0, duration];
    this.#moved();
  }

  seek(seconds) {
    const target = Math.min(Math.max(0, seconds), this.duration ?? seconds);
    if (this.#stillAt === null) this.#video.currentTime = target;
    else {
      this.#stillAt = target;
      this.#moved();
    }
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
    if (this.#stillAt !== null) return undefined;
    if (!this.#video.paused) return this.#video.pause();
    try {
      await this.#video.play();
    } catch (error) {
      // A new source, a strange format or the browser's own rules stop a start; the state is shown as it is.
      if (!(error instanceof DOMException)) throw error;
    }
    return this.#showState();
  }

  /** Plays; each further call makes it faster, up to four times. */
  faster() {
    const now = SPEEDS.indexOf(this.#video.playbackRate);
    if (this.playing) this.setSpeed(SPEEDS[Math.min(now + 1, SPEEDS.length - 1)]);
    else {
      this.setSpeed(1);
      this.toggle();
    }
  }

  setSpeed(speed) {
    this.#video.playbackRate = speed;
    byId("speed").value = String(speed);
  }

  toggleSound() {
    this.#video.muted = !this.#video.muted;
  }

  async fullscreen() {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await byId("player").requestFullscreen?.();
  }

  /** Between `timeupdate` events, four a second, the head would stutter; this follows every shown frame. */
  #followFrames() {
    const step = () => {
      if (!this.#video.paused) this.#moved();
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  #moved() {
    const [now, length] = byId("time").children;
    const text = time(this.time);
    if (now.textContent !== text) now.textContent = text;
    length.textContent = this.duration === null ? "" : time(this.duration);
    this.dispatchEvent(new Event("time"));
  }

  #showState() {
    const label = (node, name, text) => {
      node.replaceChildren(icon(name));
      node.setAttribute("aria-label", text);
      node.title = text;
    };
    label(this.#toggle, this.playing ? "pause" : "play", t(this.playing ? "player.pause" : "player.play"));
    label(this.#mute, this.#video.muted ? "silent" : "sound", t("player.sound"));
    this.#mute.setAttribute("aria-pressed", String(this.#video.muted));
  }
}

function hasSound(video) {
  return Boolean(video.mozHasAudio || video.webkitAudioDecodedByteCount || video.audioTracks?.length);
}
