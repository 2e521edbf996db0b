/**
 * The media of the conversation: chosen files, their local addresses and their upload in the background.
 *
 * It knows neither player nor questions. A medium is `{name, kind, bytes, url, file, id, duration, fps, width, height, share,
 * error}`;
 * `url` is null for one that is only on the server, `id` is null until the upload is done.
 */

import { fileInfo, upload } from "./api.js";
import { amount, words } from "./data.js";
import { begin, change, end } from "./runs.js";

export const MAX_MEDIA = 8;

const VIDEO = /\.(mp4|m4v|mov|mkv|webm|avi|ts|mts|m2ts|mpg|mpeg|flv|wmv|ogv|3gp|gif)$/i;
const IMAGE = /\.(jpe?g|png|webp|bmp|tiff?|avif)$/i;

/** "video", "image", or null for a file that is neither. */
export function kindOf(file) {
  if (file.type.startsWith("video/") || VIDEO.test(file.name)) return "video";
  if (file.type.startsWith("image/") || IMAGE.test(file.name)) return "image";
  return null;
}

export class Media extends EventTarget {
  #items = [];
  #uploads = new Map();

  get items() {
    return this.#items;
  }

  get video() {
    return this.#items.find((item) => item.kind === "video") ?? null;
  }

  /** Whether every medium has reached the server. */
  get ready() {
    return this.#items.every((item) => item.id !== null);
  }

  /** Adds a file of this machine and begins to upload it. Returns the medium. Fires `change` as the upload goes on. */
  add(file) {
    const item = {
      name: file.name || "pasted", kind: kindOf(file), bytes: file.size, url: URL.createObjectURL(file), file,
      id: null, duration: null, fps: null, width: null, height: null, share: 0, error: null,
    };
    this.#items = [...this.#items, item];
    this.start(item);
    return item;
  }

  /** Takes up the media of a kept conversation; of a file that only has an `id`, `check` finds out the rest. */
  restore(kept) {
    this.clear();
    this.#items = kept.map((item) => ({ ...item, url: null, file: null, share: 1, error: null, isComing: true }));
    this.#changed();
  }

  /** Puts a file in the place of a medium that is no longer on the server. */
  attach(item, file) {
    Object.assign(item, { file, url: URL.createObjectURL(file), id: null, share: 0, error: null });
    this.start(item);
  }

  remove(item) {
    this.#uploads.get(item)?.abort();
    if (item.url) URL.revokeObjectURL(item.url);
    this.#items = this.#items.filter((other) => other !== item);
    this.#changed();
  }

  clear() {
    for (const item of this.#items) {
      this.#uploads.get(item)?.abort();
      if (item.url?.startsWith("blob:")) URL.revokeObjectURL(item.url);
    }
    this.#items = [];
    this.#changed();
  }

  /** Uploads a medium, or tries again after an error. */
  async start(item) {
    const stop = new AbortController();
    this.#uploads.set(item, stop);
    [item.error, item.began] = [null, performance.now()];
    const run = begin({ kind: "upload", title: item.name, share: 0, stop: () => this.remove(item) });
    this.#changed();
    const progress = (sent, total) => {
      item.share = total ? sent / total : 0;
      change(run, { share: item.share });
      this.#changed();
    };
    try {
      this.#take(item, await upload(item.file, progress, stop.signal));
    } catch (error) {
      if (error.name === "AbortError") return;
      item.error = error;
    } finally {
      end(run);
    }
    this.#changed();
  }

  /** Asks whether the server still has a kept medium; an error is left at the medium. */
  async check(item) {
    try {
      this.#take(item, await fileInfo(item.id));
    } catch (error) {
      item.error = error;
      item.id = null;
    }
    this.#changed();
  }

  #take(item, object) {
    item.id = words(object?.id, 200) || null;
    item.duration = amount(object?.keye?.duration) ?? item.duration;
    item.fps = amount(object?.keye?.fps);
    item.name ||= words(object?.filename, 300);
    item.kind ||= object?.keye?.kind === "image" ? "image" : "video";
    item.bytes ??= amount(object?.bytes) ?? 0;
    item.width = amount(object?.keye?.width);
    item.height = amount(object?.keye?.height);
    item.share = 1;
    if (item.id === null) item.error = new TypeError("id");
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
