/**
 * The timeline under the player: lanes that share one view of the time, the head, and the range for the next question.
 * It knows times and moments, not questions. At most 200 elements at any length of the video; all else is canvas.
 */

import { byId, element } from "./dom.js";
import { cells, CUT_LANE_FROM, drawDensity, drawEvidence, drawPictures, drawSeen } from "./lanes.js";
import { Marks } from "./marks.js";
import { startGestures } from "./gestures.js";
import { language, plural, t, time as timeText } from "./strings.js";

/** Least pixels between two labels of the axis, and the pixels that one needs. */
const LABEL_GAP = 8;
const LABEL_ROOM = 76;
const AXIS_STEPS = [0.5, 1, 2, 4, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
const MAX_PICTURES = 60;
/** Milliseconds without a change of the view before pictures are asked for. */
const REST = 120;
const SHORTEST = 1;
/** The share of the width that the first moment takes after an answer. */
const MOMENT_SHARE = 0.1;

export class Timeline extends EventTarget {
  #duration = 0;
  #now = 0;
  #view = [0, 0];
  #moments = [];
  #weaker = [];
  #all = [];
  #evidence = null;
  #coverage = null;
  #cuts = [];
  #lines = [];
  #range = [null, null];
  #thumbnails = null;
  #frame = 0;
  #version = 0;
  #widths = new Map();
  #drawnOverview = "";
  #rest = 0;
  #lane = new Marks(byId("moments"), (moments) => this.#choose(moments));
  #overview = new Marks(byId("whole-marks"), (moments) => this.#choose(moments));

  /**
   * Fires `jump` (seconds), `choose` (a moment), `range` ([start, end]), `step` (frames), `hover`
   * ({time, x}) and `view`.
   */
  constructor() {
    super();
    startGestures(this);
    byId("playhead").addEventListener("keydown", (event) => this.#key(event));
    byId("zoom-in").addEventListener("click", () => this.zoom(0.5));
    byId("zoom-out").addEventListener("click", () => this.zoom(2));
    byId("zoom-switch").addEventListener("click", () => (this.isWhole ? this.seeMoment() : this.seeAll()));
    new ResizeObserver(() => this.draw()).observe(byId("track"));
    for (const type of ["language", "theme"]) {
      document.addEventListener(type, () => {
        this.#version += 1;
        this.draw();
      });
    }
  }

  get duration() {
    return this.#duration;
  }

  get view() {
    return this.#view;
  }

  get now() {
    return this.#now;
  }

  get selected() {
    return this.#range;
  }

  get isWhole() {
    return this.#view[1] - this.#view[0] >= this.#duration - 1e-6;
  }

  /** Shows all of a video of `duration` seconds, without moments; `thumbnails` may be null. */
  reset(duration, thumbnails) {
    [this.#duration, this.#thumbnails, this.#now] = [duration, thumbnails, 0];
    byId("timeline").hidden = !(duration > 0);
    byId("playhead").setAttribute("aria-valuemax", duration.toFixed(1));
    this.show({});
    this.see(0, duration);
  }

  /** Shows what an answer brought: `moments` and `weaker` ones with a `state`, `evidence` frames and `coverage`. */
  show({ moments = [], weaker = [], evidence = null, coverage = null }) {
    const inside = ({ start }) => start <= this.#duration;
    [this.#moments, this.#weaker] = [moments.filter(inside), weaker.filter(inside)];
    this.#all = [...this.#moments, ...this.#weaker].sort((a, b) => a.start - b.start);
    [this.#evidence, this.#coverage] = [evidence, coverage];
    this.#version += 1;
    this.draw();
  }

  /** Seconds of the hard cuts of the video. */
  setCuts(cuts) {
    this.#cuts = cuts;
    this.draw();
  }

  /** Lines `{start, end, text, isMatch}` of the subtitles. */
  setSubtitles(lines) {
    this.#lines = lines;
    this.draw();
  }

  setRange(start, end) {
    this.#range = [start, end];
    this.draw();
  }

  drawThumbs() {
    this.draw();
  }

  /** Moves the head, and the view with it when it leaves what was seen. */
  moveTo(time) {
    const leaves = this.#sees(this.#now) && !this.#sees(time);
    this.#now = time;
    if (leaves) this.reveal(time);
    this.#drawHead();
  }

  /** Moves the view so that `time` is in it. */
  reveal(time) {
    const half = (this.#view[1] - this.#view[0]) / 2;
    if (!this.#sees(time)) this.see(time - half, time + half);
  }

  /** The moment before or after `time`, or null. */
  neighbour(time, direction) {
    const sorted = [...this.#moments].sort((a, b) => a.start - b.start);
    const next = direction > 0
      ? sorted.find(({ start }) => start > time + 0.05)
      : sorted.findLast(({ start }) => start < time - 0.05);
    return next ?? null;
  }

  ofRank(rank) {
    return this.#moments.find((moment) => moment.rank === rank) ?? null;
  }

  /** The moment that the head is in, else the first of the ranks. */
  get current() {
    const isIn = ({ start, end }) => this.#now >= start - 0.01 && this.#now <= end + 0.01;
    return this.#moments.find(isIn) ?? this.ofRank(1) ?? this.#moments[0] ?? null;
  }

  #sees(time) {
    return time >= this.#view[0] && time <= this.#view[1];
  }

  say(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #choose(moments) {
    const [first] = moments;
    if (moments.length === 1) return this.say("choose", first);
    const [from, to] = [first.start, moments.at(-1).end];
    const room = Math.max(SHORTEST, to - from);
    return this.see(from - room / 2, to + room / 2);
  }

  // What part is seen

  see(start, end) {
    const length = Math.min(this.#duration, Math.max(SHORTEST, end - start));
    const from = Math.min(Math.max(0, start), this.#duration - length);
    this.#view = [from, from + length];
    this.draw();
  }

  seeAll() {
    this.see(0, this.#duration);
  }

  /** Shows the moment at the head so that it takes a tenth of the width. */
  seeMoment(moment = this.current) {
    if (!moment) return;
    const length = Math.max(moment.end - moment.start, 0.2) / MOMENT_SHARE;
    const middle = (moment.start + moment.end) / 2;
    this.see(middle - length / 2, middle + length / 2);
  }

  /** Makes the view `factor` times as long about `time`: the head where nothing else is named. */
  zoom(factor, time = this.#sees(this.#now) ? this.#now : (this.#view[0] + this.#view[1]) / 2) {
    const [start, end] = this.#view;
    this.see(time - (time - start) * factor, time + (end - time) * factor);
  }

  pan(seconds) {
    this.see(this.#view[0] + seconds, this.#view[1] + seconds);
  }

  #key(event) {
    const steps = { PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
    const frames = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
    if (event.shiftKey || !(event.key in steps || event.key in frames)) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key in frames) this.say("step", frames[event.key]);
    else this.say("jump", Math.min(this.#duration, Math.max(0, this.#now + steps[event.key])));
  }

  // Drawing, once a frame

  draw() {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => this.drawNow());
  }

  /** Draws what `draw` would draw with the next frame. */
  drawNow() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#duration > 0) this.#drawAll();
  }

  #drawAll() {
    const width = byId("track").clientWidth;
    if (!width) return;
    const view = this.#view;
    const hasOverview = !this.isWhole;
    const length = view[1] - view[0];
    byId("lane-whole").hidden = !hasOverview;
    byId("lane-cuts").hidden = !this.#cuts.length || length < CUT_LANE_FROM;
    byId("lane-evidence").hidden = !this.#evidence?.length;
    byId("lane-seen").hidden = !this.#coverage;
    byId("lane-subtitles").hidden = !this.#lines.length;
    const isComplete = drawPictures(byId("pictures"), view, this.#duration, this.#thumbnails, this.#cuts);
    byId("pictures").dataset.drawn = isComplete ? "yes" : "";
    if (!isComplete) this.#wantPictures(width);
    const current = this.#moments.length ? this.current?.id : null;
    this.#lane.draw(this.#all, view, width, current);
    drawEvidence(byId("evidence"), view, this.#evidence);
    drawSeen(byId("seen"), view, this.#coverage);
    if (!byId("lane-cuts").hidden) drawDensity(byId("cuts"), view, this.#cuts, "--edge");
    if (hasOverview) this.#drawOverview(width, current);
    this.#drawSubtitles(width);
    this.#drawRange();
    this.#drawAxis(width);
    this.#drawHead();
    this.#drawButtons(hasOverview);
    this.say("view", view);
  }

  #drawOverview(width, current) {
    const full = [0, this.#duration];
    // All of the video looks the same while a part of it is dragged.
    const drawn = [this.#version, width, current, language()].join();
    if (this.#drawnOverview !== drawn) {
      drawEvidence(byId("whole-canvas"), full, this.#evidence);
      this.#overview.draw(this.#all, full, width, current, { asPoints: true });
      this.#drawnOverview = drawn;
    }
    const box = byId("window");
    const wide = Math.max(32, ((this.#view[1] - this.#view[0]) / this.#duration) * width);
    const middle = ((this.#view[0] + this.#view[1]) / 2 / this.#duration) * width;
    box.style.width = `${wide}px`;
    box.style.left = `${Math.min(width - wide, Math.max(0, middle - wide / 2))}px`;
  }

  #drawButtons(isZoomed) {
    byId("zoom-out").disabled = !isZoomed;
    byId("zoom-in").disabled = this.#view[1] - this.#view[0] <= SHORTEST;
    byId("zoom-switch").textContent = t(isZoomed ? "zoom.all" : "zoom.moment");
    byId("zoom-switch").hidden = !isZoomed && !this.#moments.length;
    byId("evidence").setAttribute("aria-label", plural("evidence.name", this.#evidence?.length ?? 0));
    byId("seen").setAttribute("aria-label", t("seen.name"));
    byId("cuts").setAttribute("aria-label", plural("cuts.name", this.#cuts.length));
  }

  /** Asks for the pictures of this view from the middle outwards once it rests. */
  #wantPictures(width) {
    clearTimeout(this.#rest);
    this.#rest = setTimeout(() => {
      if (!this.#thumbnails?.aspect) return;
      const height = byId("track").clientHeight;
      const { list } = cells(this.#view, width, this.#duration, this.#thumbnails.aspect, height);
      const far = ({ left, width: wide }) => Math.abs(left + wide / 2 - width / 2);
      const missing = list.filter(({ time }) => !this.#thumbnails.at(time)).sort((a, b) => far(a) - far(b));
      this.#thumbnails.want(missing.slice(0, MAX_PICTURES).map(({ time }) => time));
    }, REST);
  }

  #percent(time) {
    const [start, end] = this.#view;
    return end > start ? ((time - start) / (end - start)) * 100 : 0;
  }

  #drawHead() {
    const head = byId("playhead");
    head.classList.toggle("outside", !this.#sees(this.#now));
    head.style.left = `${Math.min(100, Math.max(0, this.#percent(this.#now)))}%`;
    // The head stands over the lanes of the view, below the one that shows all of the video.
    const top = byId("lane-whole").hidden ? 0 : byId("lane-whole").offsetHeight + 4;
    head.style.top = `${top}px`;
    head.setAttribute("aria-valuenow", this.#now.toFixed(1));
    head.setAttribute("aria-valuetext", timeText(this.#now));
  }

  #drawRange() {
    const [start, end] = this.#range;
    const box = byId("selection");
    const [left, right] = [this.#percent(start ?? 0), this.#percent(end ?? this.#duration)];
    box.hidden = (start === null && end === null) || right < 0 || left > 100;
    box.style.left = `${Math.max(0, left)}%`;
    box.style.width = `${Math.min(100, right) - Math.max(0, left)}%`;
  }

  #drawSubtitles(width) {
    const box = byId("subtitle-texts");
    if (!this.#lines.length) return box.replaceChildren();
    const [from, to] = this.#view;
    const visible = this.#lines.filter(({ start, end }) => end >= from && start <= to);
    const pixels = (seconds) => (seconds / (to - from)) * width;
    const asTexts = visible.length <= 40 && visible.every(({ start, end }) => pixels(end - start) > 48);
    byId("subtitle-canvas").hidden = asTexts;
    if (!asTexts) {
      const marks = visible.filter(({ isMatch }) => isMatch).map(({ start }) => start);
      box.replaceChildren();
      return drawDensity(byId("subtitle-canvas"), this.#view, visible.map(({ start }) => start), "--cue", { least: 0.35, marks });
    }
    return box.replaceChildren(...visible.map(({ start, end, text, isMatch }) => {
      const line = element("span", { class: isMatch ? "line match" : "line", text, title: text });
      const [left, right] = [Math.max(0, pixels(start - from)), Math.min(width, pixels(end - from))];
      line.style.left = `${left}px`;
      line.style.width = `${right - left - 2}px`;
      return line;
    }));
  }

  /** Pixels of a label, by its length: figures have the same width. Measuring each would lay the page out each time. */
  #measure(text) {
    if (!this.#widths.has(text.length)) {
      const label = element("span", { text });
      byId("axis").append(label);
      this.#widths.set(text.length, label.offsetWidth);
      label.remove();
    }
    return this.#widths.get(text.length);
  }

  #drawAxis(width) {
    const axis = byId("axis");
    const [start, end] = this.#view;
    const room = Math.max(2, width / LABEL_ROOM);
    const step = AXIS_STEPS.find((size) => (end - start) / size <= room) ?? (end - start) / room;
    const labels = [];
    let free = 0;
    for (let at = Math.ceil(start / step - 1e-6) * step; at <= end && end > start; at += step) {
      const text = timeText(at, step < 1 ? 1 : 0);
      const left = (this.#percent(at) / 100) * width;
      const right = left + this.#measure(text);
      // A label that does not fit whole before the next or before the edge is left out.
      if (left < free || right > width) continue;
      const label = element("span", { text });
      label.style.left = `${left}px`;
      labels.push(label);
      free = right + LABEL_GAP;
    }
    axis.replaceChildren(...labels);
  }
}
