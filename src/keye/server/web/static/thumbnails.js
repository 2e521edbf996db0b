/**
 * Small pictures of a video, drawn by the browser one at a time from a second, hidden player. Nothing waits for them.
 *
 * It knows no timeline: it is given a time and a canvas.
 */

export class Thumbnails {
  #video = document.createElement("video");
  #queue = [];
  #current = null;
  #usable = false;

  /** `url` is the local address of the video; `onReady` is called once its shape is known. */
  constructor(url, onReady = () => {}) {
    this.#video.muted = true;
    this.#video.playsInline = true;
    this.#video.preload = "auto";
    this.#video.addEventListener("loadeddata", () => {
      this.#usable = true;
      onReady();
      this.#next();
    });
    this.#video.addEventListener("seeked", () => this.#draw());
    this.#video.addEventListener("error", () => (this.#queue = []));
    this.#video.src = url;
  }

  /** Width over height, or null before it is known. */
  get aspect() {
    return this.#video.videoWidth ? this.#video.videoWidth / this.#video.videoHeight : null;
  }

  /** Draws the picture at `time` on `canvas` when its turn comes; a canvas waits for one time only. */
  request(time, canvas, { first = false } = {}) {
    this.#queue = this.#queue.filter((waiting) => waiting.canvas !== canvas);
    if (first) this.#queue.unshift({ time, canvas });
    else this.#queue.push({ time, canvas });
    this.#next();
  }

  /** Forgets what waits, as when the timeline shows another part. */
  forget() {
    this.#queue = [];
  }

  close() {
    this.forget();
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  #next() {
    if (!this.#usable || this.#current || !this.#queue.length) return;
    this.#current = this.#queue.shift();
    const last = Math.max(0, (this.#video.duration || 0) - 0.05);
    const target = Math.min(this.#current.time, last);
    // A seek to where the player is already reports nothing in some browsers.
    if (Math.abs(this.#video.currentTime - target) < 1e-3) this.#draw();
    else this.#video.currentTime = target;
  }

  #draw() {
    if (!this.#current) return;
    const { canvas } = this.#current;
    this.#current = null;
    // The whole picture, never cut: what is at its edge may be what is looked for.
    const scale = Math.min(canvas.width / this.#video.videoWidth, canvas.height / this.#video.videoHeight);
    const [width, height] = [this.#video.videoWidth * scale, this.#video.videoHeight * scale];
    const context = canvas.getContext("2d");
    context.drawImage(this.#video, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
    canvas.dataset.drawn = "yes";
    const idle = window.requestIdleCallback ?? requestAnimationFrame;
    idle(() => this.#next());
  }
}
