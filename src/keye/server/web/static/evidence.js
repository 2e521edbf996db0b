/**
 * The strip that shows how often the indexer selected each frame while the answer was generated.
 *
 * It draws what `data.evidence` made safe; the part of the video that is seen is the timeline's.
 */

import { button, byId } from "./dom.js";
import { clock } from "./times.js";

export class EvidenceStrip {
  #canvas = byId("evidence");
  #note = byId("evidence-note");
  #data = null;
  #view = [0, 0];

  /** `jump` is called with seconds when one of the most looked-at moments is chosen. */
  constructor(jump) {
    this.jump = jump;
  }

  /** Shows evidence, or nothing for null. */
  show(data) {
    this.#data = data;
    const drawn = Boolean(data?.frames.length);
    byId("evidence-box").hidden = data === null;
    this.#canvas.hidden = !drawn;
    this.#note.replaceChildren(...(data ? this.#legend(data, drawn) : []));
    this.#canvas.setAttribute("aria-label", drawn ? `Evidence for ${data.frames.length} frames` : "No evidence");
    this.draw(this.#view);
  }

  /** The share at a time as a sentence, or "" where there is none. */
  describe(time) {
    const frame = this.#nearest(time);
    if (!frame) return "";
    const lift = frame.lift === null ? "" : `, ${frame.lift.toFixed(1)} times an even share`;
    return `frame at ${clock(frame.time)}: ${percent(frame.share)} of the indexer's selections${lift}`;
  }

  /** Draws the seconds from `view[0]` to `view[1]` over the width of the strip. */
  draw(view) {
    this.#view = view;
    if (!this.#data?.frames.length || view[1] <= view[0]) return;
    const canvas = this.#canvas;
    const ratio = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(canvas).color;
    for (const [left, width, level] of this.#columns(canvas.width)) {
      context.globalAlpha = level;
      context.fillRect(left, 0, width, canvas.height);
    }
  }

  /** Left edge, width and strength (0 to 1) of each frame's cell; a frame reaches half way to its neighbours. */
  #columns(width) {
    const { frames } = this.#data;
    const most = frames.reduce((high, frame) => Math.max(high, frame.share), 0) || 1;
    const [start, end] = this.#view;
    const x = (time) => ((time - start) / (end - start)) * width;
    return frames.map((frame, i) => {
      const before = i ? (frames[i - 1].time + frame.time) / 2 : frame.time - this.#halfGap(i);
      const after = i + 1 < frames.length ? (frame.time + frames[i + 1].time) / 2 : frame.time + this.#halfGap(i);
      const left = Math.max(0, x(before));
      return [left, Math.max(1, Math.min(width, x(after)) - left), frame.share / most];
    });
  }

  #halfGap(i) {
    const { frames } = this.#data;
    if (frames.length < 2) return 0.5;
    const j = i ? i - 1 : 1;
    return Math.abs(frames[i].time - frames[j].time) / 2;
  }

  #nearest(time) {
    let best = null;
    for (const frame of this.#data?.frames ?? []) {
      if (!best || Math.abs(frame.time - time) < Math.abs(best.time - time)) best = frame;
    }
    return best;
  }

  #legend(data, drawn) {
    if (!drawn) return [data.reason || "The server sent no evidence for this answer."];
    const label = data.top.length ? "Selected most: " : "Darker: selected more often.";
    const moments = data.top.map((time) => button(clock(time), () => this.jump(time), { class: "moment" }));
    return [label, ...moments, ...(data.reason ? [` ${data.reason}`] : [])];
  }
}

function percent(share) {
  return `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
}
