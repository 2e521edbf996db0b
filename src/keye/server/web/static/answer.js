/**
 * One question and its answer as they are shown: what is under way, then moments, words, and what they rest on.
 *
 * This module draws a turn; it sends nothing. What it wants done it says by the handlers it gets.
 */

import { card, momentRow, sureness } from "./card.js";
import { button, element } from "./dom.js";
import { icon } from "./icons.js";
import { attachMenu } from "./menu.js";
import { codeOf, noteBox, serverNote } from "./notes.js";
import { number, percent, plural, spoken, t, when } from "./strings.js";
import { pieces } from "./times.js";
import { doneLine, Working } from "./working.js";

const THRESHOLDS = [0, 0.3, 0.5, 0.7, 0.9];

export class AnswerView {
  #head = element("div", { class: "turn-head" });
  #summary = element("p", { class: "visually-hidden" });
  #body = element("div", { class: "turn-body", "aria-live": "off" });
  #text = element("div", { class: "answer-text" });
  #thought = element("div", { class: "thought" });
  #foot = element("div", { class: "turn-body", "aria-live": "off" });
  #working = null;
  #found = null;
  #timer = 0;

  /**
   * `handlers`: `jump`, `play`, `picture`, `save`, `formats`, `more`, `link` of a moment; `seek(turn, seconds)`,
   * `region(turn, i)`, `stop`, `again(turn)`, `details(turn)`, `reword(turn)`, `closer(turn)`, `models()`,
   * `threshold(turn, value)`, `canExport()`, `exporting(turn)`, `isBack()` resolving to whether the server answers.
   */
  constructor(turn, handlers) {
    this.turn = turn;
    this.handlers = handlers;
    this.answer = element("div", { class: "answer", "aria-busy": "false" }, this.#summary, this.#body, this.#text, this.#foot);
    this.node = element("article", { class: "turn" }, this.#head, this.answer);
    this.#drawHead();
    if (turn.isDone) this.finish();
  }

  #drawHead() {
    const { mode, at, question } = this.turn;
    const facts = [t(`mode.${mode}`), at ? when(at) : ""].filter(Boolean).join(", ");
    this.#head.replaceChildren(element("h2", { class: "question", text: question }), element("span", { text: facts }));
  }

  /** Says that the answer is under way. */
  begin() {
    this.answer.setAttribute("aria-busy", "true");
    this.#working = new Working(() => this.handlers.stop());
    this.#body.replaceChildren(this.#working.node);
  }

  /** Says that the question waits for its files or the answer before, with a way back. */
  wait(text, back) {
    this.#body.replaceChildren(noteBox("tint", "", text, button(t("wait.back"), back, { class: "link" })));
  }

  phase(progress) {
    this.#working.phase(progress);
  }

  /** Says that the search waits for others of the server. */
  waiting() {
    this.#working.title(t("search.waiting"));
  }

  search(progress) {
    this.#working.search(progress);
  }

  /** Shows the moments that a search has so far. */
  findings() {
    this.#working.found(this.turn.moments.length);
    this.#found?.remove();
    this.#found = element("div", { class: "turn-body" }, ...this.#moments());
    this.#body.append(this.#found);
  }

  /** Adds text of the answer as it comes. */
  write(text) {
    this.#text.append(text);
  }

  think(text) {
    if (!this.#thought.isConnected) this.#body.append(this.#reasoning());
    this.#thought.append(text);
  }

  #reasoning() {
    return element("details", { class: "reasoning" }, element("summary", { text: t("reasoning") }), this.#thought);
  }

  /** Shows the turn as it is at its end. */
  finish() {
    clearTimeout(this.#timer);
    const { turn } = this;
    this.#working = this.#found = null;
    this.#drawHead();
    const parts = pieces(turn.answer ?? "");
    // What was found stands as moments; a list of times that the model wrote says the same.
    const isListed = turn.mode === "find" || (turn.moments?.length > 0 && !parts.some(isWords));
    this.#thought.textContent = turn.reasoning ?? "";
    this.#body.replaceChildren(...[
      ...this.#outcome(), ...(turn.reasoning ? [this.#reasoning()] : []), ...this.#moments(),
    ]);
    this.#text.replaceChildren(...(isListed ? [] : this.#pieces(turn.answer ?? "")));
    this.#foot.replaceChildren(...this.#notes(), ...this.#tools(isListed), ...this.#why());
    this.#summary.textContent = isListed && !turn.failed ? summary(turn) : "";
    this.answer.setAttribute("aria-busy", "false");
  }

  /** How it ended, where that is not plain from the answer: failed, stopped, not found, done. */
  #outcome() {
    const { turn, handlers } = this;
    if (turn.failed === "gone") return this.#gone();
    if (turn.failed) {
      const again = button(t("again"), () => handlers.again(turn), { icon: "again" });
      return [noteBox("wrong", "", turn.note), element("div", { class: "row" }, again)];
    }
    const stopped = turn.stopped ? [noteBox("", "", t(turn.moments?.length ? "stopped.kept" : "stopped"))] : [];
    if (turn.mode !== "find") return stopped;
    if (!turn.moments?.length && !turn.stopped) return this.#notFound();
    if (turn.route !== "search" || turn.stopped) return stopped;
    return [element("p", { class: "row done" }, icon("check"), doneLine(turn.seconds, turn.moments.length))];
  }

  #notFound() {
    const { turn, handlers } = this;
    const frames = turn.coverage?.frames ?? (turn.plan ?? []).reduce((sum, medium) => sum + medium.frames, 0);
    const seen = turn.coverage?.unseen.length
      ? t("notfound.part", { share: percent(turn.coverage.share ?? 0) })
      : frames ? plural("notfound.frames", frames) : "";
    const chance = turn.presence === null || turn.presence === undefined ? "" : t("notfound.chance", { share: percent(turn.presence) });
    const box = noteBox("", t("notfound.title"), [seen, chance].filter(Boolean).join(" "));
    const closer = handlers.canSearch(turn) ? [button(t("notfound.closer"), () => handlers.closer(turn))] : [];
    const words = button(t("notfound.words"), () => handlers.reword(turn), { class: closer.length ? "quiet" : "" });
    return [box, element("div", { class: "row" }, ...closer, words)];
  }

  /** The server cannot be reached: it is asked again after 5 s, then at longer intervals, until it answers. */
  #gone(seconds = 5) {
    const { turn, handlers } = this;
    const rest = element("span");
    const box = noteBox("wrong", t("gone.title"), t("gone.text"));
    box.children[1].append(" ", rest);
    const now = button(t("gone.now"), () => {
      clearTimeout(this.#timer);
      handlers.again(turn);
    }, { icon: "again" });
    const count = async (left, pause) => {
      if (!this.node.isConnected) return;
      rest.textContent = t("gone.again", { seconds: number(left) });
      if (left > 0) return void (this.#timer = setTimeout(() => count(left - 1, pause), 1000));
      if (await handlers.isBack()) rest.textContent = t("gone.back");
      else count(Math.min(60, pause * 2), Math.min(60, pause * 2));
    };
    this.#timer = setTimeout(() => count(seconds, seconds));
    return [box, element("div", { class: "row" }, now)];
  }

  #moments() {
    const { moments = [], weaker = [] } = this.turn;
    const handlers = this.handlers;
    const bound = Object.fromEntries(
      ["jump", "play", "link", "more", "formats"].map((name) => [name, (moment) => handlers[name](this.turn, moment)]),
    );
    const own = { ...bound, save: handlers.save, picture: handlers.picture };
    const [first, ...others] = moments ?? [];
    const rows = others.map((moment) => momentRow(moment, own));
    return [
      ...(first ? [card(first, own)] : []), ...rows, ...this.#weak(weaker ?? [], own), ...this.#exports(),
    ];
  }

  /** One line for the weaker places, folded. */
  #weak(weaker, own) {
    if (!weaker.length) return [];
    const box = element("div", { class: "folded", hidden: true }, ...weaker.map((moment) => momentRow(moment, own)));
    const most = Math.max(...weaker.map(({ probability }) => probability ?? 0));
    const facts = [most ? percent(most) : "", weaker.every(({ checked }) => checked === "failed") ? t("checked.failed") : ""];
    return [fold(plural("weaker", weaker.length), facts.filter(Boolean).join(", "), box), box];
  }

  #exports() {
    const { turn, handlers } = this;
    if (!turn.isDone || !turn.moments?.length) return [];
    const row = element("div", { class: "row" });
    if (handlers.canExport()) {
      const count = turn.moments.length;
      row.append(button(plural("export", count), () => handlers.exporting(turn), { icon: "save" }));
    }
    if ([...turn.moments, ...(turn.weaker ?? [])].some(({ probability }) => probability !== null)) {
      const from = button(t("threshold", { share: percent(turn.threshold ?? 0) }), () => {}, { class: "quiet" });
      from.append(icon("down"));
      attachMenu(from, () => t("threshold.name"), () => THRESHOLDS.map((value) => ({
        text: t("threshold", { share: percent(value) }), checked: value === turn.threshold,
        act: () => handlers.threshold(turn, value),
      })));
      row.append(from);
    }
    return row.children.length ? [row] : [];
  }

  #pieces(text) {
    let region = -1;
    return pieces(text.trim()).map((piece) => {
      if (piece.kind === "text") return piece.text;
      if (piece.kind === "interval") return this.#link(spoken(piece), piece.start, piece.label);
      if (piece.kind === "moment") return this.#link(piece.text, piece.at, "");
      region += 1;
      const index = region;
      return button(`${index + 1}`, () => this.handlers.region(this.turn, index), {
        class: "time-link", "aria-label": t("region.show", { number: number(index + 1) }),
      });
    });
  }

  #link(text, seconds, label) {
    const node = button(text, () => this.handlers.seek(this.turn, seconds), {
      class: "time-link", "aria-label": [t("moment.jump", { range: text }), label].filter(Boolean).join(", "),
    });
    if (!this.handlers.hasPictures()) return node;
    const canvas = element("canvas", { width: 84, height: 48, "aria-hidden": "true" });
    node.prepend(canvas);
    this.handlers.picture(canvas, seconds);
    return node;
  }

  #notes() {
    const { turn, handlers } = this;
    const found = (turn.notes ?? []).map((note) => {
      if (codeOf(note) !== "loop") return serverNote(note);
      const chip = element("span", { class: "chip warn" }, icon("stop"), t("note.loop"));
      return element("div", { class: "row" }, chip, button(t("loop.words"), () => handlers.reword(turn)));
    });
    if ((turn.notes ?? []).some((note) => codeOf(note) === "scope") && handlers.models) {
      found.push(element("div", { class: "row" }, button(t("scope.models"), (event) => handlers.models(event.currentTarget))));
    }
    const looped = (turn.notes ?? []).some((note) => codeOf(note) === "loop");
    if (turn.isCut && !looped) found.push(noteBox("", "", t("cut.limit")));
    return found;
  }

  /** For an answer in words: copy, link and menu in one row; the card has its own. */
  #tools(isListed) {
    const { turn, handlers } = this;
    if (isListed || turn.failed || !turn.answer) return [];
    const more = button("", () => {}, { icon: "more", class: "icon-button", "aria-label": t("more"), title: t("more") });
    attachMenu(more, () => t("more"), () => handlers.more(turn, null));
    const link = button("", () => handlers.link(turn, null), { icon: "link", class: "icon-button", "aria-label": t("link.copy"), title: t("link.copy") });
    return [element("div", { class: "row" }, element("span", { class: "space" }), link, more)];
  }

  #why() {
    const { turn, handlers } = this;
    if (turn.failed) return [];
    if (turn.coverage) {
      const box = element("div", { class: "folded", hidden: true }, ...howSearched(turn));
      return [fold(t("how"), "", box), box];
    }
    const rests = (turn.evidence ?? []).reduce((sum, { top }) => sum + top.length, 0);
    const open = button("", () => handlers.details(turn), { icon: "right", class: "fold why-open" });
    open.append(element("span", {}, element("b", { text: t("why") }), rests ? ` ${plural("why.frames", rests)}` : ""));
    return [open];
  }
}

function isWords({ kind, text }) {
  return kind !== "interval" && text?.trim();
}

/** A button that shows and hides `box`. */
function fold(title, facts, box) {
  const node = button("", () => {
    box.hidden = !box.hidden;
    node.setAttribute("aria-expanded", String(!box.hidden));
  }, { icon: "right", class: "fold", "aria-expanded": "false" });
  node.append(element("span", {}, element("b", { text: title }), facts ? ` ${facts}` : ""));
  return node;
}

/** What a search looked at, in words and figures. */
export function howSearched({ coverage }) {
  const seen = coverage.unseen.length
    ? t("how.part", { share: percent(coverage.share ?? 0) })
    : t("how.all");
  const places = coverage.places ? plural("how.places", coverage.places) : "";
  const rows = [];
  if (coverage.frames !== null) rows.push(["how.frames", plural("frames", coverage.frames)]);
  if (coverage.queryTokens !== null) {
    const part = coverage.indexTokens ? coverage.queryTokens / coverage.indexTokens : null;
    const share = part === null ? "" : ` ${t("how.share", { share: percent(part) })}`;
    rows.push(["how.tokens", number(coverage.queryTokens) + share]);
  }
  const list = element("dl", { class: "facts-list" });
  for (const [key, value] of rows) list.append(element("dt", { text: t(key) }), element("dd", { text: value }));
  return [element("p", { text: [seen, places].filter(Boolean).join(" ") }), list];
}

/** What a screen reader hears once: "1 moment, 0:03.0 to 0:08.5, 97%, very likely". */
export function summary({ mode, moments, presence }) {
  if (!moments?.length) {
    if (mode !== "find") return "";
    const chance = presence === null || presence === undefined ? "" : t("notfound.chance", { share: percent(presence) });
    return [t("notfound.title"), chance].filter(Boolean).join(" ");
  }
  const [first] = moments;
  const sure = first.probability === null ? "" : percent(first.probability);
  return [plural("moments", moments.length), spoken(first), sure, sureness(first.probability)].filter(Boolean).join(", ");
}
