/** Results over many videos: coverage first, then a grid, best first or by video; chosen ones are exported together. */

import { explain, findInLibrary, frames, stopSearch } from "./api.js";
import { chips, quote, sureLine } from "./card.js";
import * as data from "./data.js";
import { button, element } from "./dom.js";
import { openExport } from "./export.js";
import { icon } from "./icons.js";
import { isAble, model } from "./model.js";
import { noteBox } from "./notes.js";
import { say } from "./notices.js";
import { go, route } from "./router.js";
import { begin, change, end } from "./runs.js";
import { number, percent, plural, range, spoken, t } from "./strings.js";

const LEVELS = [0, 0.3, 0.5, 0.7, 0.9];
const HEIGHT = 160;

export class Results {
  #handlers;
  #question = null;
  #found = [];
  #coverage = null;
  #problem = "";
  #run = null;
  #stop = null;
  #id = null;
  #chosen = new Set();
  #last = 0;
  #pictures = new Map();
  #level = null;

  /** `handlers`: `open(target)`, `draw()`. */
  constructor(handlers) {
    this.#handlers = handlers;
  }

  get isShown() {
    return this.#question !== null;
  }

  /** Takes up what an address asks for; a question that is shown already is not asked again. */
  take({ question, threshold }) {
    this.#level = threshold;
    if (question === this.#question) return;
    this.#stop?.abort();
    [this.#question, this.#found, this.#coverage, this.#problem, this.#id] = [question, [], null, "", null];
    this.#chosen.clear();
    if (question) this.#search(question);
  }

  async #search(question) {
    const stop = new AbortController();
    this.#stop = stop;
    const run = begin({ kind: "find", title: question, stop: () => this.#end() });
    this.#run = run;
    try {
      for await (const event of findInLibrary({ model: model()?.id, event: question, stream: true }, stop.signal)) {
        if (stop.signal.aborted) return;
        this.#event(event, run);
        this.#handlers.draw();
      }
    } catch (error) {
      if (!stop.signal.aborted) this.#problem = explain(error).join(" ");
    } finally {
      end(run);
      if (this.#run === run) this.#run = null;
    }
    if (!stop.signal.aborted) this.#handlers.draw();
  }

  #event(event, run) {
    const step = data.searchProgress(event);
    if (step) change(run, { share: step.total ? step.done / step.total : null, left: step.left });
    if (event?.type === "started") this.#id = data.words(event.id, 100);
    if (event?.type === "moments") this.#show(data.moments(event.moments));
    if (event?.type !== "result") return;
    const { moments, weaker, coverage, threshold } = event.result ?? {};
    this.#level ??= data.share(threshold) ?? 0;
    this.#coverage = coverage ?? null;
    this.#show([...data.moments(moments), ...data.moments(weaker)]);
    say(plural("results.found", this.#strong.length));
  }

  #show(moments) {
    this.#found = moments.filter(({ file }) => file);
  }

  /** Ends the search; what it has stays. */
  #end() {
    if (this.#id) stopSearch(this.#id).catch(() => this.#stop.abort());
    else this.#stop.abort();
  }

  get #strong() {
    return this.#found.filter(({ probability, checked }) => checked !== "failed" && (probability ?? 1) >= 0.5);
  }

  nodes() {
    const { order } = route();
    const shown = this.#found.filter(({ probability }) => (probability ?? 1) >= (this.#level ?? 0));
    const sorted = order === "video"
      ? [...shown].sort((a, b) => (a.name ?? "").localeCompare(b.name ?? "") || a.start - b.start)
      : [...shown].sort((a, b) => a.rank - b.rank);
    const grid = element("ul", { class: "grid", "aria-label": t("results") }, ...sorted.map((moment, i) => this.#card(moment, i, sorted)));
    return [
      this.#line(), ...(this.#problem ? [noteBox("wrong", "", this.#problem)] : []), this.#tools(order),
      sorted.length || this.#run ? grid : element("p", { class: "list nothing", text: t("results.none") }),
    ];
  }

  /** What was found and in how much of the library. */
  #line() {
    const line = element("p", { class: "row" }, element("b", { text: plural("results.found", this.#strong.length) }));
    const { searched, duration, missing } = this.#coverage ?? {};
    if (data.amount(duration)) {
      const hours = (value) => number(value / 3600, 1);
      line.append(element("span", { class: "soft", text: t("results.coverage", { searched: hours(data.amount(searched) ?? 0), all: hours(duration) }) }));
    }
    if (Array.isArray(missing) && missing.length) {
      line.append(element("span", { class: "soft", text: plural("results.missing", missing.length), title: missing.map((video) => `${video?.name ?? ""}: ${video?.reason ?? ""}`).join("\n") }));
    }
    if (this.#run) {
      const share = this.#run.share === null ? "" : percent(this.#run.share);
      line.append(element("span", { class: "soft figure", text: [t("search.coarse"), share].filter(Boolean).join(" ") }),
        button(t("stop.keep"), () => this.#end(), { icon: "stop" }));
    }
    return line;
  }

  #tools(order) {
    const radio = (value) => element("label", {}, element("input", {
      type: "radio", name: "results-order", id: `order-${value}`, value, checked: value === order,
      on: { change: () => go({ ...route(), order: value }) },
    }), element("span", { text: t(`results.${value}`) }));
    const levels = element("select", {
      id: "results-level", "aria-label": t("threshold.name"), on: { change: (event) => go({ ...route(), threshold: Number(event.target.value) }) },
    }, ...LEVELS.map((value) => element("option", { value, text: t("threshold", { share: percent(value) }), selected: value === (this.#level ?? 0) })));
    const row = element("div", { class: "row" }, element("div", { class: "segments" }, radio("best"), radio("video")), levels, element("span", { class: "space" }));
    const chosen = this.#found.filter(({ id }) => this.#chosen.has(id));
    if (chosen.length && isAble("export")) {
      row.append(element("b", { text: plural("results.chosen", chosen.length) }), button(plural("export", chosen.length), () => {
        const videos = Object.fromEntries(chosen.map(({ file, name }) => [file, { id: file, name, fps: null }]));
        openExport(chosen, videos, this.#question);
      }, { icon: "save", id: "results-export" }));
    }
    row.append(button(t("results.close"), () => go({ place: "library" }), { class: "quiet" }));
    return row;
  }

  #card(moment, i, sorted) {
    const target = { place: "desk", file: moment.file, mode: "find", question: this.#question, range: [moment.start, moment.end] };
    const box = element("input", {
      type: "checkbox", id: `choose-${i}`, checked: this.#chosen.has(moment.id), "aria-label": t("results.choose", { range: spoken(moment) }),
      on: { click: (event) => this.#choose(i, sorted, event.shiftKey) },
    });
    const canvas = element("canvas", { width: 284, height: HEIGHT, "aria-hidden": "true" });
    this.#picture(moment, canvas);
    return element(
      "li", { class: this.#chosen.has(moment.id) ? "card chosen" : "card" },
      element("button", { type: "button", class: "shot", "aria-label": t("play.name", { range: spoken(moment) }), on: { click: () => this.#handlers.open(target) } },
        canvas, element("span", { class: moment.checked === "twice" ? "rank" : "rank hollow", text: String(moment.rank) }), icon("play")),
      element("div", { class: "facts-of" },
        element("div", { class: "row" }, element("b", { class: "range", text: range(moment) }), element("span", { class: "space" }), element("label", { class: "tick" }, box)),
        element("span", { class: "soft cut-text", text: moment.name ?? moment.file, title: moment.name ?? moment.file }), sureLine(moment),
        element("div", { class: "row" }, ...chips(moment)), quote(moment)),
    );
  }

  /** Chooses a result; with Shift all from the last one to it. */
  #choose(i, sorted, isRange) {
    const isChosen = !this.#chosen.has(sorted[i].id);
    const [from, to] = isRange ? [Math.min(i, this.#last), Math.max(i, this.#last)] : [i, i];
    for (const { id } of sorted.slice(from, to + 1)) {
      if (isChosen) this.#chosen.add(id);
      else this.#chosen.delete(id);
    }
    this.#last = i;
    this.#handlers.draw();
  }

  /** The frame in the middle of a moment, from the server, once. */
  async #picture({ id, file, start, end: stop }, canvas) {
    if (!isAble("frames")) return;
    const key = `${file} ${id} ${start}`;
    if (!this.#pictures.has(key)) {
      this.#pictures.set(key, frames({ video: { file_id: file }, times: [(start + stop) / 2], height: HEIGHT }).catch(() => []));
    }
    const [first] = await this.#pictures.get(key);
    if (typeof first?.url !== "string" || !first.url.startsWith("data:image/jpeg;base64,")) return;
    const image = Object.assign(new Image(), { src: first.url });
    await image.decode();
    const scale = Math.min(canvas.width / image.width, canvas.height / image.height);
    const [wide, high] = [image.width * scale, image.height * scale];
    canvas.getContext("2d").drawImage(image, (canvas.width - wide) / 2, (canvas.height - high) / 2, wide, high);
    canvas.dataset.drawn = "yes";
  }
}
