/**
 * One question and its answer as they are shown: progress, text as it comes, reasoning folded, marks, times and tools.
 *
 * A turn is `{mode, question, answer, reasoning, intervals, regions, evidence, plan, usage, attention, note, request}`.
 * This module draws it; it sends nothing. What it wants done it says by the handlers it is given.
 */

import { button, copyText, element } from "./dom.js";
import { clock, pieces, span } from "./times.js";

const PHASES = { decode: "Reading the video", encode: "Looking at frames", prefill: "Taking it in" };

export class AnswerView {
  #text = element("div", { class: "answer-text" });
  #status = element("div", { class: "phases" });
  #thought = element("div", { class: "thought" });
  #reasoning = element("details", { class: "reasoning", hidden: true }, element("summary", { text: "Reasoning" }));
  #foot = element("div", { class: "answer-foot" });
  #note = element("p", { class: "note", hidden: true });
  #bars = new Map();

  /**
   * `handlers`: `jump(seconds)`, `focus(turn)` to show a turn's marks, `region(index)`, `clips(intervals, button)`,
   * `curl(turn)` which returns a text, `again(turn)`.
   */
  constructor(turn, handlers) {
    this.turn = turn;
    this.handlers = handlers;
    this.#reasoning.append(this.#thought);
    const question = element("p", { class: "question" });
    if (turn.mode === "find") question.append(element("span", { class: "tag", text: "Find" }), " ");
    question.append(turn.question);
    this.article = element(
      "div", { class: "answer", "aria-live": "polite", "aria-busy": "false" },
      this.#status, this.#reasoning, this.#text, this.#note,
    );
    this.node = element("li", { class: "turn" }, question, this.article, this.#foot);
    if (turn.answer || turn.note) this.finish();
  }

  /** Says that the answer is under way. */
  begin() {
    this.article.setAttribute("aria-busy", "true");
    this.#status.replaceChildren(element("span", { class: "working", text: "Sent" }));
  }

  /** Shows how far a phase is. */
  progress({ phase, done, total }) {
    if (!this.#bars.size) this.#status.replaceChildren();
    let bar = this.#bars.get(phase);
    if (!bar) {
      const label = element("span", { text: PHASES[phase] });
      bar = { meter: element("progress", { "aria-label": PHASES[phase] }), count: element("span", { class: "count" }) };
      this.#status.append(element("div", { class: "phase" }, label, bar.meter, bar.count));
      this.#bars.set(phase, bar);
    }
    if (!total) return;
    bar.meter.max = total;
    bar.meter.value = done;
    bar.count.textContent = `${done.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  }

  /** Adds text of the answer as it comes. */
  write(text) {
    if (!this.#text.textContent) this.#status.replaceChildren();
    this.#text.append(text);
  }

  think(text) {
    this.#reasoning.hidden = false;
    this.#thought.append(text);
  }

  /** Shows the turn as it is at its end, with marks. */
  finish() {
    const { turn } = this;
    this.#status.replaceChildren();
    this.#text.replaceChildren(...this.#pieces(turn.answer ?? ""));
    this.#thought.textContent = turn.reasoning ?? "";
    this.#reasoning.hidden = !turn.reasoning;
    this.#note.textContent = turn.note ?? "";
    this.#note.hidden = !turn.note;
    this.#note.classList.toggle("calm", !turn.failed);
    this.#foot.replaceChildren(...this.#tools(), element("p", { class: "usage", text: usageLine(turn) }));
    this.article.setAttribute("aria-busy", "false");
  }

  #pieces(text) {
    let region = -1;
    return pieces(text.trim()).map((piece) => {
      if (piece.kind === "text") return piece.text;
      if (piece.kind === "interval") {
        return this.#mark(span([piece.start, piece.end]), piece.start, "mark", piece.label);
      }
      if (piece.kind === "moment") return this.#mark(piece.text, piece.at, "moment", "");
      region += 1;
      const index = region;
      return button(`${index + 1}`, () => this.handlers.region(this.turn, index), {
        class: "mark", "aria-label": `Show place ${index + 1} in the picture`,
      });
    });
  }

  #mark(text, seconds, kind, label) {
    const jump = () => {
      this.handlers.focus(this.turn);
      this.handlers.jump(seconds);
    };
    return button(text, jump, { class: kind, "aria-label": `Jump to ${text}${label ? `: ${label}` : ""}` });
  }

  #tools() {
    const { turn, handlers } = this;
    const tools = [];
    if (turn.intervals?.length) {
      tools.push(
        button("Copy times", (event) => copyText(timesAsText(turn), event.currentTarget)),
        button("Save all clips", (event) => handlers.clips(turn.intervals, event.currentTarget)),
        this.#clipList(),
      );
    }
    const copier = (label, text) => button(label, (event) => copyText(text(), event.currentTarget));
    if (turn.answer) tools.push(copier("Copy answer", () => turn.answer));
    if (turn.request) tools.push(copier("Copy as curl", () => handlers.curl(turn)));
    if (turn.note && turn.request) tools.unshift(button("Try again", () => handlers.again(turn), { class: "primary" }));
    const show = turn.intervals?.length || turn.evidence || turn.regions?.length;
    if (show) tools.push(button("Show on timeline", () => handlers.focus(turn)));
    return tools.length ? [element("div", { class: "tools" }, ...tools)] : [];
  }

  /** One row for each interval: jump there, save it. */
  #clipList() {
    const rows = this.turn.intervals.map(([start, end]) => {
      const name = span([start, end]);
      return element(
        "li", {}, this.#mark(`${name} (${(end - start).toFixed(1)} s)`, start, "mark", ""),
        button("Save clip", (event) => this.handlers.clips([[start, end]], event.currentTarget), {
          "aria-label": `Save the clip ${name}`,
        }),
      );
    });
    const title = `${rows.length} ${rows.length === 1 ? "moment" : "moments"}`;
    return element(
      "details", { class: "clips" }, element("summary", { text: title }), element("ul", {}, ...rows),
    );
  }
}

/** One line for each interval, with tabs, as spreadsheets take it. */
function timesAsText(turn) {
  return turn.intervals.map(([start, end]) => `${clock(start)}\t${clock(end)}`).join("\n");
}

function usageLine({ plan, usage, attention, seconds }) {
  const parts = [];
  const frames = (plan ?? []).reduce((sum, one) => sum + one.frames, 0);
  if (frames) parts.push(`${frames.toLocaleString("en")} ${frames === 1 ? "frame" : "frames"}`);
  if (usage?.prompt) parts.push(`${usage.prompt.toLocaleString("en")} prompt tokens`);
  if (usage?.generated) parts.push(`${usage.generated.toLocaleString("en")} generated`);
  if (attention) parts.push(`${attention} attention`);
  if (seconds && parts.length) parts.push(`${seconds.toFixed(1)} s`);
  return parts.join(" · ");
}
