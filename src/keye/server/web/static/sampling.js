/**
 * How a video will be looked at by the next question: range, frames a second, most frames, and what that costs.
 *
 * The costs come from the server's plan; this module asks for it again when something changes.
 */

import { explain, plan as askPlan } from "./api.js";
import { amount, plans } from "./data.js";
import { byId, element } from "./dom.js";
import { planRequest } from "./request.js";
import { number, percent, plural, said, t, time } from "./strings.js";
import { clock, toSeconds } from "./times.js";

/** Milliseconds without a change before the server is asked. */
const PAUSE = 250;

export class Sampling extends EventTarget {
  #summary = byId("plan-summary");
  #meter = byId("plan-meter");
  #timer = 0;
  #stop = null;
  #plan = null;

  /** `subject` returns `{model, media}`, media null as long as something is not uploaded. Fires `range`, `planned`. */
  constructor(subject) {
    super();
    this.subject = subject;
    byId("sampling").addEventListener("input", () => this.#edited());
    byId("sampling").addEventListener("submit", (event) => event.preventDefault());
    byId("range-clear").addEventListener("click", () => this.setRange(null, null));
    byId("sampling-reset").addEventListener("click", () => this.reset());
    document.addEventListener("language", () => {
      this.#edited(false);
      if (this.#plan) this.#show();
    });
  }

  /** The settings of a video part; null where the server decides. */
  get values() {
    const [start, end] = this.range;
    return { fps: valueOf("fps"), max_frames: valueOf("max-frames"), video_start: start, video_end: end };
  }

  /** The field that is wrong and why, as `{field, message}`; null where all are right. */
  get problem() {
    const field = [...byId("sampling").elements].find((candidate) => !candidate.checkValidity());
    if (!field) return null;
    return { field, message: field.validity.customError ? field.validationMessage : t("range.number") };
  }

  /** Start and end in seconds, null for an open end. */
  get range() {
    return [readTime("start"), readTime("end")];
  }

  /** The plan of the video, or null. */
  get planned() {
    return this.#plan?.media.find(({ kind }) => kind === "video") ?? null;
  }

  /** Sets the range, as when it was drawn on the timeline. */
  setRange(start, end) {
    byId("start").value = start === null ? "" : clock(start);
    byId("end").value = end === null ? "" : clock(end);
    this.#edited();
  }

  reset() {
    byId("fps").value = byId("max-frames").value = "";
    this.setRange(null, null);
  }

  /** Plans again, soon. */
  refresh() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), PAUSE);
  }

  #edited(isNew = true) {
    const wrong = this.#wrongRange();
    for (const id of ["start", "end"]) byId(id).setCustomValidity(wrong[id] ?? "");
    this.#showProblem();
    if (!isNew) return;
    this.dispatchEvent(new Event("range"));
    this.refresh();
  }

  #showProblem() {
    const { problem } = this;
    byId("sampling-problem").textContent = problem ? `${problem.message} ${t("range.block")}` : "";
    for (const field of byId("sampling").elements) {
      if (field === problem?.field) field.setAttribute("aria-invalid", "true");
      else field.removeAttribute("aria-invalid");
    }
  }

  /** What is wrong with start and end, by field. */
  #wrongRange() {
    for (const id of ["start", "end"]) {
      if (byId(id).value.trim() && readTime(id) === null) return { [id]: t("range.form") };
    }
    const [start, end] = this.range;
    if (start !== null && end !== null && end <= start) return { end: t("range.order", { start: time(start) }) };
    const { duration } = this.subject();
    if (duration && start !== null && start >= duration) return { start: t("range.after", { end: time(duration) }) };
    return {};
  }

  async #ask() {
    this.#stop?.abort();
    const { model, media } = this.subject();
    this.#plan = null;
    this.#meter.hidden = true;
    byId("plan-notes").replaceChildren();
    if (!media) return this.#say(t("plan.later"));
    if (!media.length || !model) return this.#say("");
    this.#edited(false);
    if (this.problem) return this.#say("");
    this.#stop = new AbortController();
    try {
      const result = await askPlan(planRequest({ model, media, sampling: this.values }), this.#stop.signal);
      this.#plan = {
        media: plans(result?.media), names: media.map(({ name }) => name), fits: result?.fits !== false,
        tokens: amount(result?.prompt_tokens) ?? amount(result?.visual_tokens), context: amount(result?.context),
      };
      this.#show();
    } catch (error) {
      if (error.name !== "AbortError") this.#say(explain(error).join(" "), true);
    }
    return this.dispatchEvent(new Event("planned"));
  }

  #show() {
    const { media, names, fits, tokens, context } = this.#plan;
    const parts = [plural("frames", media.reduce((sum, medium) => sum + medium.frames, 0))];
    if (tokens !== null) parts.push(t("plan.tokens", { tokens: number(tokens) }));
    if (tokens !== null && context) {
      parts.push(t("plan.share", { share: percent(tokens / context) }));
      Object.assign(this.#meter, { max: context, value: Math.min(tokens, context), hidden: false });
    }
    if (!fits) parts.push(t("plan.full"));
    this.#say(parts.join(", "), !fits);
    const named = (i) => (media.length > 1 && names[i] ? `${names[i]}: ` : "");
    const notes = media.flatMap((medium, i) => medium.notes.map((note) => named(i) + said(note)));
    byId("plan-notes").replaceChildren(...notes.map((text) => element("li", { text })));
  }

  #say(text, isWrong = false) {
    this.#summary.textContent = text;
    this.#summary.classList.toggle("problem", isWrong);
  }
}

function readTime(id) {
  return toSeconds(byId(id).value);
}

function valueOf(id) {
  const { value } = byId(id);
  return value === "" || !Number.isFinite(Number(value)) ? null : Number(value);
}
