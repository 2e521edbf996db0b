/**
 * How a video will be looked at: frames a second, most frames and range, and what that costs before it is sent.
 *
 * The costs come from the server's plan; this module asks for it again when something changes.
 */

import { explain, plan as askPlan } from "./api.js";
import { amount, plans } from "./data.js";
import { byId, element } from "./dom.js";
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

  /** The field that is wrong and why, as `{field, message}`; null where all are right. */
  get problem() {
    const field = [...byId("sampling").elements].find((candidate) => !candidate.checkValidity());
    return field ? { field, message: `${field.labels[0].textContent.trim()}: ${field.validationMessage}` } : null;
  }

  /** Opens the fields and puts the cursor into the one that is wrong. */
  showProblem() {
    byId("advanced").open = true;
    this.problem?.field.focus();
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

  #edited(again = true) {
    const wrong = this.#wrongRange();
    for (const id of ["start", "end"]) byId(id).setCustomValidity(wrong[id] ?? "");
    this.#showProblem();
    this.#showRange();
    if (!again) return;
    this.dispatchEvent(new Event("range"));
    this.refresh();
  }

  #showProblem() {
    const problem = this.problem;
    byId("sampling-problem").textContent = problem ? `${problem.message} Nothing is sent until this is right.` : "";
    for (const field of byId("sampling").elements) {
      if (field === problem?.field) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }

  /** What is wrong with start and end, by field. */
  #wrongRange() {
    for (const id of ["start", "end"]) {
      if (byId(id).value.trim() && readTime(id) === null) return { [id]: "Write seconds, m:ss or h:mm:ss." };
    }
    const [start, end] = this.range;
    if (start !== null && end !== null && end <= start) return { end: `The end is before the start, ${clock(start)}.` };
    const { duration } = this.subject();
    if (duration && start !== null && start >= duration) return { start: `The video ends at ${clock(duration)}.` };
    return {};
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
    byId("plan-notes").replaceChildren();
    if (!media) return this.#say("The cost is planned when the upload is done.");
    if (!media.length) return this.#say("");
    this.#edited(false);
    if (this.problem) return this.#say(this.problem.message, true);
    this.#stop = new AbortController();
    try {
      this.#show(await askPlan(planRequest({ model, media, sampling: this.values }), this.#stop.signal), media);
    } catch (error) {
      if (error.name !== "AbortError") this.#say(explain(error).join(" "), true);
    }
  }

  #show(result, media) {
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
    byId("plan-notes").replaceChildren(...notesOf(planned, media).map((text) => element("li", { text })));
    const times = planned.find((one) => one.kind === "video")?.timestamps ?? [];
    this.dispatchEvent(new CustomEvent("planned", { detail: times }));
  }

  #say(text, wrong = false) {
    this.#summary.textContent = text;
    this.#summary.classList.toggle("wrong", wrong);
  }
}

/** The notes on each medium, after its name where there are several. */
function notesOf(planned, media) {
  const name = (i) => (planned.length > 1 && media[i] ? `${media[i].name}: ` : "");
  return planned.flatMap((one, i) => one.notes.map((note) => name(i) + note));
}

function readTime(id) {
  return toSeconds(byId(id).value);
}

function count(number) {
  return number.toLocaleString("en");
}
