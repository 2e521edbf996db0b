/**
 * The timeline under the player: thumbnails, the intervals of the answer as bars, the playhead, the range for the next
 * question, and a part of the video that can be made larger. It knows times, not questions.
 */

import { byId, element } from "./dom.js";
import { clock, span } from "./times.js";

/** Most thumbnails, and least pixels between two labels of the axis. */
const MAX_THUMBNAILS = 60;
const LABEL_GAP = 8;
const MAX_LANES = 4;
/** A pointer that moves less far than this clicks; one that moves further drags. */
const DRAG_PIXELS = 5;
const AXIS_STEPS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];

export class Timeline extends EventTarget {
  #box = byId("timeline");
  #track = byId("track");
  #thumbs = byId("thumbs");
  #lanes = byId("lanes");
  #axis = byId("axis");
  #playhead = byId("playhead");
  #selection = byId("selection");
  #ticks = byId("ticks");
  #duration = 0;
  #now = 0;
  #view = [0, 0];
  #intervals = [];
  #range = [null, null];
  #frames = [];
  #thumbnails = null;
  #drag = null;

  /** Fires `jump` (detail: seconds), `range` ([start, end] or [null, null]), `hover` (seconds or null, x) and `view`. */
  constructor() {
    super();
    this.#track.addEventListener("pointerdown", (event) => this.#press(event));
    this.#track.addEventListener("pointermove", (event) => this.#move(event));
    this.#track.addEventListener("pointerup", (event) => this.#release(event));
    this.#track.addEventListener("pointercancel", () => (this.#drag = null));
    this.#box.addEventListener("pointerleave", () => this.#say("hover", { time: null }));
    byId("evidence").addEventListener("pointermove", (event) => this.#hover(event));
    this.#playhead.addEventListener("keydown", (event) => this.#key(event));
    byId("zoom-in").addEventListener("click", () => this.#zoom(0.5));
    byId("zoom-out").addEventListener("click", () => this.#zoom(2));
    byId("zoom-all").addEventListener("click", () => this.#see(0, this.#duration));
    new ResizeObserver(() => this.#draw()).observe(this.#track);
  }

  get intervals() {
    return this.#intervals;
  }

  get view() {
    return this.#view;
  }

  /** Shows the whole of a video of `duration` seconds, without intervals; `thumbnails` may be null. */
  reset(duration, thumbnails) {
    this.#duration = duration;
    this.#now = 0;
    this.#thumbnails = thumbnails;
    this.#intervals = [];
    this.#box.hidden = !(duration > 0);
    this.#see(0, duration);
  }

  /** Shows the intervals of an answer: `{start, end, label}` in seconds. */
  setIntervals(intervals) {
    this.#intervals = intervals.filter(({ start }) => start <= this.#duration);
    this.#drawLanes();
  }

  /** Shows the times of the frames that a question will see. */
  setFrames(times) {
    this.#frames = times;
    this.#drawTicks();
  }

  setRange(start, end) {
    this.#range = [start, end];
    this.#drawRange();
  }

  /** Draws the thumbnails again, as when the shape of the video is known. */
  drawThumbs() {
    this.#drawThumbs();
  }

  /** Moves the playhead, and the view with it when it leaves what was seen. */
  moveTo(time) {
    const leaves = this.#sees(this.#now) && !this.#sees(time);
    this.#now = time;
    if (leaves) this.reveal(time);
    this.#drawPlayhead();
  }

  /** Moves the view so that `time` is in it. */
  reveal(time) {
    const [start, end] = this.#view;
    if (!this.#sees(time)) this.#see(time, time + end - start);
  }

  #sees(time) {
    return time >= this.#view[0] && time <= this.#view[1];
  }

  #drawPlayhead() {
    const time = this.#now;
    this.#playhead.classList.toggle("outside", !this.#sees(time));
    this.#playhead.style.left = `${Math.min(100, Math.max(0, this.#percent(time)))}%`;
    this.#playhead.setAttribute("aria-valuenow", time.toFixed(1));
    this.#playhead.setAttribute("aria-valuetext", clock(time));
    for (const bar of this.#lanes.querySelectorAll("button")) {
      const inside = time >= Number(bar.dataset.start) - 0.01 && time <= Number(bar.dataset.end);
      bar.classList.toggle("current", inside);
    }
  }

  /** The start of the interval before or after `time`, or null. */
  neighbour(time, direction) {
    const starts = this.#intervals.map(({ start }) => start).sort((a, b) => a - b);
    const found = direction > 0 ? starts.find((start) => start > time + 0.05) : starts.findLast((s) => s < time - 0.05);
    return found ?? null;
  }

  #say(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  // What part is seen

  #see(start, end) {
    const length = Math.min(this.#duration, Math.max(1, end - start));
    const from = Math.min(Math.max(0, start), this.#duration - length);
    this.#view = [from, from + length];
    this.#playhead.setAttribute("aria-valuemax", this.#duration.toFixed(1));
    byId("zoom-all").disabled = length >= this.#duration;
    byId("zoom-out").disabled = length >= this.#duration;
    byId("zoom-in").disabled = length <= 1;
    this.#draw();
  }

  /** Makes the part `factor` times as long around the range if there is one, else around the playhead. */
  #zoom(factor) {
    const [start, end] = this.#view;
    const [from, to] = this.#range;
    if (factor < 1 && from !== null && to !== null && to - from < end - start) return this.#see(from, to);
    const centre = this.#sees(this.#now) ? this.#now : (start + end) / 2;
    const half = ((end - start) * factor) / 2;
    return this.#see(centre - half, centre + half);
  }

  #percent(time) {
    const [start, end] = this.#view;
    return end > start ? ((time - start) / (end - start)) * 100 : 0;
  }

  #time(event) {
    const { left, width } = this.#track.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
    return this.#view[0] + share * (this.#view[1] - this.#view[0]);
  }

  // Pointer and keys

  #press(event) {
    if (event.button !== 0 || event.target.closest("button") || event.target === this.#playhead) return;
    this.#drag = { x: event.clientX, time: this.#time(event), moved: false };
    this.#track.setPointerCapture(event.pointerId);
  }

  #move(event) {
    this.#hover(event);
    if (!this.#drag) return;
    this.#drag.moved ||= Math.abs(event.clientX - this.#drag.x) > DRAG_PIXELS;
    if (!this.#drag.moved) return;
    const [start, end] = [this.#drag.time, this.#time(event)].sort((a, b) => a - b);
    this.setRange(start, end);
  }

  #release(event) {
    if (!this.#drag) return;
    const { moved } = this.#drag;
    this.#drag = null;
    if (moved) this.#say("range", this.#range.map((time) => Math.round(time * 10) / 10));
    else this.#say("jump", this.#time(event));
  }

  #hover(event) {
    if (this.#duration > 0) this.#say("hover", { time: this.#time(event), x: event.clientX });
  }

  #key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 };
    let target = null;
    if (event.key in steps) target = this.#now + steps[event.key];
    else if (event.key === "Home") target = 0;
    else if (event.key === "End") target = this.#duration;
    if (target === null) return;
    event.preventDefault();
    event.stopPropagation();
    this.#say("jump", Math.min(this.#duration, Math.max(0, target)));
  }

  // Drawing

  #draw() {
    this.#drawThumbs();
    this.#drawLanes();
    this.#drawTicks();
    this.#drawRange();
    this.#drawAxis();
    this.#drawPlayhead();
    this.#say("view", this.#view);
  }

  #drawThumbs() {
    const width = this.#track.clientWidth;
    this.#thumbnails?.forget();
    const height = this.#thumbs.clientHeight;
    if (!this.#thumbnails?.aspect || !width) return this.#thumbs.replaceChildren();
    // As many as fit in the shape of the video, each in the middle of its part of the time.
    const own = height * Math.min(4, Math.max(0.3, this.#thumbnails.aspect));
    const count = Math.min(MAX_THUMBNAILS, Math.max(1, Math.floor(width / own)));
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const [start, end] = this.#view;
    const cells = Array.from({ length: count }, (_, i) => {
      const canvas = element("canvas", { width: Math.ceil(own * ratio), height: Math.ceil(height * ratio) });
      canvas.style.width = `${own}px`;
      this.#thumbnails.request(start + ((i + 0.5) / count) * (end - start), canvas);
      return canvas;
    });
    return this.#thumbs.replaceChildren(...cells);
  }

  #drawLanes() {
    const lanes = [];
    const bars = [...this.#intervals].sort((a, b) => a.start - b.start).map((interval) => {
      let lane = lanes.findIndex((end) => end <= interval.start);
      if (lane < 0) lane = lanes.length < MAX_LANES ? lanes.length : MAX_LANES - 1;
      lanes[lane] = interval.end;
      return this.#bar(interval, lane);
    });
    this.#lanes.dataset.lanes = String(Math.max(1, lanes.length));
    this.#lanes.replaceChildren(...bars.filter((bar) => bar !== null));
  }

  #bar({ start, end, label }, lane) {
    const [left, right] = [this.#percent(start), this.#percent(Math.min(end, this.#duration))];
    if (right < 0 || left > 100) return null;
    const name = label ? `${span([start, end])}: ${label}` : span([start, end]);
    const bar = element("button", {
      type: "button", class: "bar", title: name, "aria-label": `Jump to ${name}`, "data-start": start, "data-end": end,
      "data-lane": lane, on: { click: () => this.#say("jump", start) },
    });
    bar.style.left = `${Math.max(0, left)}%`;
    bar.style.width = `${Math.min(100, right) - Math.max(0, left)}%`;
    return bar;
  }

  #drawTicks() {
    const seen = this.#frames.filter((time) => time >= this.#view[0] && time <= this.#view[1]);
    const width = this.#track.clientWidth;
    // Ticks closer than three pixels would be a bar of one colour and slow for long videos.
    const shown = seen.length * 3 > width ? [] : seen;
    this.#ticks.replaceChildren(...shown.map((time) => {
      const tick = element("span");
      tick.style.left = `${this.#percent(time)}%`;
      return tick;
    }));
  }

  #drawRange() {
    const [start, end] = this.#range;
    this.#selection.hidden = start === null && end === null;
    const left = Math.max(0, this.#percent(start ?? 0));
    const right = Math.min(100, this.#percent(end ?? this.#duration));
    this.#selection.style.left = `${left}%`;
    this.#selection.style.width = `${Math.max(0, right - left)}%`;
  }

  #drawAxis() {
    const [start, end] = this.#view;
    const room = Math.max(2, this.#track.clientWidth / 76);
    const step = AXIS_STEPS.find((size) => (end - start) / size <= room) ?? (end - start) / room;
    const labels = [];
    for (let time = Math.ceil(start / step) * step; time <= end && end > start; time += step) {
      const label = element("span", { text: clock(time, step < 1 ? 1 : 0) });
      label.style.left = `${this.#percent(time)}%`;
      labels.push(label);
    }
    this.#axis.replaceChildren(...labels);
    // A label that does not fit whole before the next or before the edge is left out.
    let free = 0;
    for (const label of labels) {
      const right = label.offsetLeft + label.offsetWidth;
      const fits = label.offsetLeft >= free && right <= this.#axis.clientWidth;
      if (fits) free = right + LABEL_GAP;
      else label.remove();
    }
  }
}
