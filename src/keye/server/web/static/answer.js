/**
 * One question and its answer as they are shown: progress, text as it comes, reasoning folded, then the moments, each
 * with a button that plays it, and a menu for everything else.
 *
 * A turn is `{mode, question, answer, reasoning, intervals, regions, evidence, plan, usage, attention, note, request}`.
 * This module draws it; it sends nothing. What it wants done it says by the handlers it is given.
 */

import { button, copyText, element } from "./dom.js";
import { menu } from "./menu.js";
import { clock, pieces, span } from "./times.js";

const PHASES = { media: "Opening the media", encode: "Encoding frames", prefill: "Computing the prompt" };

export class AnswerView {
  #text = element("div", { class: "answer-text" });
  #status = element("div", { class: "phases" });
  #thought = element("div", { class: "thought" });
  #reasoning = element("details", { class: "reasoning", hidden: true }, element("summary", { text: "Reasoning" }));
  #foot = element("div", { class: "answer-foot" });
  #note = element("p", { class: "note", hidden: true });
  #notes = element("ul", { class: "notes", hidden: true });
  #moments = element("div", { class: "moments" });
  #bars = new Map();

  /**
   * `handlers`: `jump(seconds)`, `play(interval)`, `focus(turn)` to show a turn's marks, `region(index)`,
   * `clips(intervals, button)`, `range(interval)`, `curl(turn)` which returns a text, `again(turn)`.
   */
  constructor(turn, handlers) {
    this.turn = turn;
    this.handlers = handlers;
    this.#reasoning.append(this.#thought);
    const question = element("h2", { class: "question" });
    if (turn.mode === "find") question.append(element("span", { class: "tag", text: "Find" }), " ");
    question.append(turn.question);
    // The log around it is read aloud as things are added; this part only once it is complete.
    this.article = element(
      "div", { class: "answer", "aria-busy": "false" },
      this.#status, this.#reasoning, this.#moments, this.#text, this.#note, this.#notes,
    );
    this.node = element("article", { class: "turn" }, question, this.article, this.#foot);
    if (turn.answer || turn.note) this.finish();
  }

  /** Says that the answer is under way. */
  begin() {
    this.article.setAttribute("aria-busy", "true");
    this.#status.replaceChildren(element("span", { class: "working", text: "Sent" }));
  }

  /** Says that the question waits for its media, with a way back. */
  wait(text, back) {
    this.#status.replaceChildren(element("span", { class: "working", text }), button("Take it back", back));
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

  /** Shows the turn as it is at its end, with its moments. */
  finish() {
    const { turn } = this;
    const parts = pieces(turn.answer ?? "");
    const listed = turn.intervals?.length > 0 && !parts.some(({ kind, text }) => kind !== "interval" && text.trim());
    this.article.setAttribute("aria-busy", "false");
    this.#status.replaceChildren();
    this.#moments.replaceChildren(...this.#momentRows());
    // What was found stands above as moments; the list that the model wrote says the same.
    this.#text.hidden = listed;
    this.#text.replaceChildren(...this.#pieces(turn.answer ?? ""));
    this.#thought.textContent = turn.reasoning ?? "";
    this.#reasoning.hidden = !turn.reasoning;
    this.#note.textContent = turn.note ?? "";
    this.#note.hidden = !turn.note;
    this.#note.classList.toggle("calm", !turn.failed);
    if (turn.failed) this.#note.setAttribute("role", "alert");
    this.#notes.replaceChildren(...(turn.notes ?? []).map((text) => element("li", { text })));
    this.#notes.hidden = !turn.notes?.length;
    this.#foot.replaceChildren(...this.#tools(), element("p", { class: "usage", text: usageLine(turn) }));
  }

  /** The moments of the answer: the first large, each with what is done with it most. */
  #momentRows() {
    const intervals = this.turn.intervals ?? [];
    const labels = pieces(this.turn.answer ?? "").filter((piece) => piece.kind === "interval");
    return intervals.map(([start, end], i) => {
      const name = span([start, end]);
      const time = this.#mark(name, start, i ? "mark" : "mark main", "");
      const label = labels.find((one) => one.start === start && one.end === end)?.label;
      const length = element("span", {
        class: "length", text: [`${(end - start).toFixed(1)} s`, label].filter(Boolean).join(" · "),
      });
      const play = button(i ? "Play" : "Play moment", () => {
        this.handlers.focus(this.turn);
        this.handlers.play([start, end]);
      }, { class: i ? "" : "primary", "aria-label": `Play the moment ${name}` });
      const save = button("Save clip", (event) => this.handlers.clips([[start, end]], event.currentTarget), {
        "aria-label": `Save the clip ${name}`,
      });
      return element("div", { class: i ? "moment-row" : "moment-row card" }, time, length, play, save);
    });
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

  /** Try again where it failed, and everything that is wanted less often in one menu. */
  #tools() {
    const { turn, handlers } = this;
    const { intervals } = turn;
    const entries = [];
    if (intervals?.length) {
      entries.push(["Copy times", (source) => copyText(timesAsText(turn), source)]);
      if (intervals.length > 1) entries.push(["Save all clips", (source) => handlers.clips(intervals, source)]);
      entries.push(["Use as range", () => handlers.range(intervals[0])]);
    }
    if (turn.answer) entries.push(["Copy answer", (source) => copyText(turn.answer, source)]);
    if (turn.request) entries.push(["Copy as curl", (source) => copyText(handlers.curl(turn), source)]);
    const shown = intervals?.length || turn.evidence || turn.regions?.length;
    if (shown) entries.push(["Show on timeline", () => handlers.focus(turn)]);
    const tools = entries.length ? [menu("More for this answer", entries)] : [];
    if (turn.note && turn.request && turn.failed) {
      tools.unshift(button("Try again", () => handlers.again(turn), { class: "primary" }));
    }
    return tools.length ? [element("div", { class: "tools" }, ...tools)] : [];
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
