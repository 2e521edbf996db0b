/**
 * Small pictures of a video at given times, drawn one after the other in the background and kept. Nothing waits for them.
 *
 * It knows no timeline. A source has `aspect` (null before it is known), `ready`, `batch` (how many pictures it draws at
 * once), `draw(times, height)`, which resolves to pictures or null in their order, and `close()`.
 */

import { frames } from "./api.js";

/** Pixels of the height of a kept picture, and how many are kept. */
const HEIGHT = 132;
const MOST = 400;

export class Thumbnails {
  #source;
  #queue = [];
  #kept = new Map();
  #isDrawing = false;
  #isClosed = false;

  /** `changed()` is called when the shape is known and whenever another picture is there. */
  constructor(source, changed) {
    this.#source = source;
    this.changed = changed;
    source.ready.then(() => {
      if (this.#isClosed) return;
      changed();
      this.#next();
    });
  }

  /** Width over height, or null. */
  get aspect() {
    return this.#source.aspect;
  }

  /** The picture at a time if it is kept, else null. */
  at(seconds) {
    return this.#kept.get(keyOf(seconds)) ?? null;
  }

  /** Draws the picture at `seconds` on `canvas`, now or when it is there; a canvas waits for one time only. */
  request(seconds, canvas, { first = false } = {}) {
    canvas.dataset.time = keyOf(seconds);
    const picture = this.at(seconds);
    if (picture) return paint(picture, canvas);
    this.#queue = this.#queue.filter((waiting) => waiting.canvas !== canvas);
    this.#queue[first ? "unshift" : "push"]({ seconds, canvas });
    return this.#next();
  }

  /** Asks for pictures without a canvas, in their order, in the place of those asked for before. */
  want(times) {
    this.#queue = [...this.#queue.filter(({ canvas }) => canvas), ...times.map((seconds) => ({ seconds, canvas: null }))];
    this.#next();
  }

  close() {
    this.#isClosed = true;
    this.#queue = [];
    this.#source.close();
  }

  async #next() {
    if (this.#isDrawing || this.#isClosed || !this.aspect || !this.#queue.length) return;
    this.#isDrawing = true;
    const waiting = this.#queue.splice(0, this.#source.batch);
    const times = waiting.map(({ seconds }) => seconds).filter((seconds) => !this.at(seconds));
    const pictures = times.length ? await this.#source.draw(times, HEIGHT) : [];
    this.#isDrawing = false;
    if (this.#isClosed) return;
    pictures.forEach((picture, i) => picture && this.#keep(times[i], picture));
    for (const { seconds, canvas } of waiting) {
      const picture = this.at(seconds);
      if (picture && canvas?.dataset.time === keyOf(seconds)) paint(picture, canvas);
    }
    const idle = window.requestIdleCallback ?? requestAnimationFrame;
    idle(() => this.#next());
  }

  #keep(seconds, picture) {
    this.#kept.set(keyOf(seconds), picture);
    if (this.#kept.size > MOST) this.#kept.delete(this.#kept.keys().next().value);
    this.changed();
  }
}

function keyOf(seconds) {
  return seconds.toFixed(2);
}

/** Draws a picture on a canvas of any shape: all of it, in the middle, never cut. */
export function paint(picture, canvas) {
  const scale = Math.min(canvas.width / picture.width, canvas.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  canvas.dataset.drawn = "yes";
}

/** Pictures from a second, hidden player of the browser. */
export class VideoSource {
  batch = 1;
  #video = document.createElement("video");
  #isOpen = true;

  constructor(url) {
    Object.assign(this.#video, { muted: true, playsInline: true, preload: "auto", src: url });
    this.ready = new Promise((resolve) => this.#video.addEventListener("loadeddata", resolve, { once: true }));
  }

  get aspect() {
    return this.#video.videoWidth ? this.#video.videoWidth / this.#video.videoHeight : null;
  }

  async draw([seconds], height) {
    const target = Math.min(seconds, Math.max(0, (this.#video.duration || 0) - 0.05));
    // A seek to where the player is already reports nothing in some browsers.
    if (Math.abs(this.#video.currentTime - target) > 1e-3) {
      const arrived = new Promise((resolve) => {
        for (const type of ["seeked", "error", "emptied"]) this.#video.addEventListener(type, resolve, { once: true });
      });
      this.#video.currentTime = target;
      await arrived;
    }
    if (!this.#isOpen) return [null];
    const width = Math.max(1, Math.round(height * this.aspect));
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(this.#video, 0, 0, width, height);
    return [canvas];
  }

  close() {
    this.#isOpen = false;
    this.#video.removeAttribute("src");
    this.#video.load();
  }
}

/** Pictures from the server, for formats that the browser cannot play. */
export class ServerSource {
  batch = 12;
  #item;

  constructor(item) {
    this.#item = item;
    this.ready = Promise.resolve();
  }

  get aspect() {
    return this.#item.width && this.#item.height ? this.#item.width / this.#item.height : null;
  }

  async draw(times, height) {
    try {
      const list = await frames({ video: { file_id: this.#item.id }, times, height });
      return await Promise.all(times.map((_, i) => decode(list[i]?.url)));
    } catch (error) {
      if (!(error instanceof Error)) throw error;
      return times.map(() => null);
    }
  }

  close() {}
}

async function decode(url) {
  if (typeof url !== "string" || !url.startsWith("data:image/jpeg;base64,")) return null;
  const image = Object.assign(new Image(), { src: url });
  await image.decode();
  return image;
}
