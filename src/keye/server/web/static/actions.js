/** What is done with a moment or an answer: clips, copies, links, and the menus that offer them. */

import { clips, explain, searchRecord, storedKey } from "./api.js";
import { byId, copyText, download } from "./dom.js";
import { openExport, stem } from "./export.js";
import { isAble } from "./model.js";
import { toast } from "./notices.js";
import { curl } from "./request.js";
import { addressOf } from "./router.js";
import { range, spoken, t } from "./strings.js";

const PATHS = { chat: "v1/chat/completions", ground: "v1/video/ground", search: "v1/video/find" };

export class Actions {
  /** `desk` has `media`, `stage`, `sampling`, `composer`, `notice(text)` and `remove(turn)`. */
  constructor(desk) {
    this.desk = desk;
  }

  formats(turn, moment) {
    const entries = [{ text: t("save.clip"), icon: "save", act: () => this.save([moment], byId("file-more")) }];
    if (turn.moments.length > 1) {
      entries.push({ text: t("save.all"), icon: "save", act: () => this.save(turn.moments, byId("file-more")) });
    }
    if (isAble("export")) entries.push({ text: t("export.open"), icon: "file", act: () => this.exporting(turn, [moment]) });
    return entries;
  }

  exporting(turn, moments) {
    openExport(moments, { "": this.desk.media.video }, turn.question);
  }

  more(turn, moment) {
    const within = moment && [
      { text: t("more.inside"), icon: "search", act: () => {
        this.desk.sampling.setRange(moment.start, moment.end);
        this.desk.composer.focus();
      } },
      { text: t("more.range"), icon: "mark", act: () => this.desk.sampling.setRange(moment.start, moment.end) },
    ];
    const times = turn.moments?.length ? [{ text: t("more.times"), icon: "copy", key: "Y", act: () => this.times(turn) }] : [];
    // On a phone there is no room for the arrow beside the button.
    const formats = moment && window.matchMedia("(max-width: 860px)").matches ? this.formats(turn, moment) : [];
    return [
      ...(within ?? []), ...formats, ...times,
      { text: t("more.answer"), icon: "copy", act: () => this.#copy(answerText(turn)) }, null,
      { text: t("more.delete"), icon: "close", act: () => this.desk.remove(turn) },
    ];
  }

  async save(moments, source) {
    const { video } = this.desk.media;
    if (!video?.id) return this.desk.notice(t("file.gone"));
    return this.#download(source, async () => {
      const blob = await clips(video.id, moments.map(({ start, end: stop }) => [start, stop]));
      const times = range(moments[0]).replaceAll(":", "m").replaceAll(/[^0-9m.]+/g, "-");
      download(blob, moments.length === 1 ? `${stemOf(video, "clip")}-${times}.mp4` : `${stemOf(video, "clip")}-clips.zip`);
    });
  }

  record(turn, source) {
    return this.#download(source, async () => {
      download(await searchRecord(turn.searchId), `${stemOf(this.desk.media.video, "search")}-record.html`);
    });
  }

  /** Runs `save`, with the button `source` out of use meanwhile; what goes wrong is said. */
  async #download(source, save) {
    source.disabled = true;
    try {
      await save();
    } catch (error) {
      this.desk.notice(explain(error).join(" "));
    } finally {
      source.disabled = false;
    }
  }

  async #copy(text, sentence = t("copied")) {
    toast((await copyText(text)) ? sentence : t("copy.not"));
  }

  /** One line for each moment, with tabs, as spreadsheets take it. */
  times(turn = this.desk.stage.turn) {
    const lines = (turn?.moments ?? []).map((moment) => range(moment).replaceAll("\u2009–\u2009", "\t"));
    if (lines.length) this.#copy(lines.join("\n"));
  }

  link(turn, moment) {
    const times = moment && [moment.start, moment.end];
    const target = { place: "desk", file: this.desk.stage.item?.id, mode: turn?.mode, question: turn?.question, range: times };
    this.#copy(addressOf(target), t("link.done"));
  }

  curl({ route, request }) {
    this.#copy(curl(new URL(PATHS[route], location.href.split("#")[0]).href, request, storedKey() !== ""));
  }
}

function stemOf(video, fallback) {
  return stem((video?.name ?? "").replace(/\.[^.]*$/, ""), fallback);
}

function answerText(turn) {
  if (turn.mode === "ask" && turn.answer) return turn.answer;
  const lines = (turn.moments ?? []).map((moment) => [spoken(moment), moment.label].filter(Boolean).join(" "));
  return [turn.question, ...lines].join("\n");
}
