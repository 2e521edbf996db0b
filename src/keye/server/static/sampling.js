/**
 * How a video will be looked at: frames a second, most frames and range, and what that costs before it is sent.
 *
 * The costs come from the server's plan; this module asks for it again when something changes.
 */

import { explain, plan as askPlan } from "./api.js";
import { amount, plans } from "./data.js";
import { byId } from "./dom.js";
import { planRequest } from "./request.js";
import { number } from "./settings.js";
import { clock, toSeconds } from "./times.js";

/** Milliseconds without a change before the server is asked. */
const PAUSE = 250;

export class Sampling extends EventTarget {
  #summary = byId("plan-summary");
  #meter = byId("plan-meter");
  #timer = 0;
  #stop = null;

  /** `subject` returns `{model, media}`, media null as long as something is not uploaded. Fires `range`, `planned`. */
  constructor(subject) {
    super();
    this.subject = subject;
    byId("sampling").addEventListener("input", () => this.#edited());
    byId("range-clear").addEventListener("click", () => this.setRange(null, null));
  }

  /** The settings of a video part; null where the server decides. */
  get values() {
    const [start, end] = this.range;
    return { fps: number("fps"), max_frames: number("max-frames"), video_start: start, video_end: end };
  }

  /** Start and end in seconds, null for an open one. */
  get range() {
    return [readTime("start"), readTime("end")];
  }

  /** Sets the range, as when it was drawn on the timeline. */
  setRange(start, end) {
    byId("start").value = start === null ? "" : clock(start);
    byId("end").value = end === null ? "" : clock(end);
    this.#edited();
  }

  /** Plans again, soon. */
  refresh() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#plan(), PAUSE);
  }

  #edited() {
    const wrong = this.#wrongRange();
    for (const id of ["start", "end"]) byId(id).setCustomValidity(wrong);
    this.#showRange();
    this.dispatchEvent(new Event("range"));
    this.refresh();
  }

  #wrongRange() {
    for (const id of ["start", "end"]) {
      if (byId(id).value.trim() && toSeconds(byId(id).value) === null) return "Write seconds, mm:ss or h:mm:ss.";
    }
    const [start, end] = this.range;
    return start !== null && end !== null && end <= start ? "The end must be after the start." : "";
  }

  #showRange() {
    const [start, end] = this.range;
    const open = start === null && end === null;
    byId("range-chip").hidden = open;
    byId("range-text").textContent = open
      ? ""
      : `Asks about ${clock(start ?? 0)} to ${end === null ? "the end" : clock(end)}`;
  }

  async #plan() {
    this.#stop?.abort();
    const { model, media } = this.subject();
    this.#meter.hidden = true;
    if (!media) return this.#say("The cost is planned when the upload is done.");
    if (!media.length) return this.#say("");
    const wrong = this.#problem();
    if (wrong) return this.#say(wrong, true);
    this.#stop = new AbortController();
    try {
      this.#show(await askPlan(planRequest({ model, media, sampling: this.values }), this.#stop.signal));
    } catch (error) {
      if (error.name !== "AbortError") this.#say(explain(error).join(" "), true);
    }
  }

  /** What is wrong with the fields as a sentence, or "". */
  #problem() {
    const field = [...byId("sampling").elements].find((candidate) => !candidate.checkValidity());
    return field ? `${field.labels[0].textContent}: ${field.validationMessage}` : "";
  }

  #show(result) {
    const planned = plans(result?.media);
    const frames = planned.reduce((sum, one) => sum + one.frames, 0);
    const [tokens, context] = [amount(result?.prompt_tokens) ?? amount(result?.visual_tokens), amount(result?.context)];
    const parts = [`${count(frames)} ${frames === 1 ? "frame" : "frames"}`];
    if (tokens !== null) parts.push(`${count(tokens)} tokens`);
    if (tokens !== null && context) {
      parts.push(`${((tokens / context) * 100).toFixed(1)} % of the context of ${count(context)}`);
      Object.assign(this.#meter, { max: context, value: Math.min(tokens, context), hidden: false });
    }
    const tooMuch = result?.fits === false;
    if (tooMuch) parts.push("this does not fit: lower the frames or choose a range");
    this.#say(parts.join(" · "), tooMuch);
    const times = planned.find((one) => one.kind === "video")?.timestamps ?? [];
    this.dispatchEvent(new CustomEvent("planned", { detail: times }));
  }

  #say(text, wrong = false) {
    this.#summary.textContent = text;
    this.#summary.classList.toggle("wrong", wrong);
  }
}

function readTime(id) {
  return toSeconds(byId(id).value);
}

function count(number) {
  return number.toLocaleString("en");
}
