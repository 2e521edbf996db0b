/** The desk: files are opened, questions become turns of a conversation, and turns are shown and kept. */

import { Actions } from "./actions.js";
import { contentAddress, explain, fileContent, isBack, stopSearch, storedKey } from "./api.js";
import { AnswerView, summary } from "./answer.js";
import { Composer } from "./composer.js";
import { drawDetails } from "./details.js";
import { button, byId } from "./dom.js";
import { FileBar } from "./filebar.js";
import { conversations, keep, newConversation } from "./history.js";
import { addFiles } from "./intake.js";
import { Media } from "./media.js";
import { isAble, loadModel, model } from "./model.js";
import { noteBox } from "./notes.js";
import { say, toast } from "./notices.js";
import { chooseTab, setTab } from "./panel.js";
import { chatRequest, findRequest, groundRequest } from "./request.js";
import { note as noteRoute } from "./router.js";
import { begin, change, end } from "./runs.js";
import { Sampling } from "./sampling.js";
import { Scenes } from "./scenes.js";
import { Stage } from "./stage.js";
import { options, setting } from "./store.js";
import { t } from "./strings.js";
import { Subtitles } from "./subtitles.js";
import { divide, runTurn } from "./turns.js";

/** A kept file up to this many bytes is fetched where its address alone does not do, as when the server has a key. */
const MAX_FETCH = 256 * 1024 * 1024;

export class Desk {
  media = new Media();
  stage = new Stage();
  actions = new Actions(this);
  subtitles = new Subtitles(this.stage);
  scenes = new Scenes(this.stage);
  sampling;
  composer;
  #bar;
  #conversation = newConversation();
  #views = [];
  #running = null;
  /** A question that waits until its files are on the server, or the answer before it is there. */
  #waiting = null;
  #planned = "";
  #extrasOf = null;

  /** `places`: `models(anchor)` shows what is known of the model, `exporting(moments, item)` or null. */
  constructor(places) {
    this.places = places;
    this.sampling = new Sampling(() => ({
      model: model()?.id, media: this.media.ready ? this.media.items : null, duration: this.media.video?.duration ?? null,
    }));
    this.composer = new Composer(() => ({
      kind: this.stage.item?.kind || "video", isBeyond: this.#isBeyond(), frames: model()?.measured, model: model()?.id,
      hasSubtitles: this.subtitles.isThere && setting("subtitles"),
    }));
    this.#bar = new FileBar(this.media, {
      open: (item) => this.open(item), remove: (item) => this.media.remove(item), retry: (item) => this.media.start(item),
      scenes: () => this.scenes.find().catch((error) => this.notice(explain(error).join(" "))),
      link: () => this.actions.link(null, null), close: () => this.clear(), add: () => byId("choose-more").click(),
      choose: () => byId("choose").click(),
    });
    this.composer.addEventListener("send", (event) => this.send(event.detail));
    this.#connect();
  }

  #connect() {
    const { media, stage, sampling, composer } = this;
    media.addEventListener("change", () => this.#mediaChanged());
    stage.addEventListener("ready", () => this.#draw());
    stage.addEventListener("unplayable", () => this.#draw());
    stage.timeline.addEventListener("range", (event) => sampling.setRange(...event.detail));
    sampling.addEventListener("range", () => {
      stage.timeline.setRange(...sampling.range);
      composer.showRange(sampling.range);
      composer.block(sampling.problem !== null);
    });
    sampling.addEventListener("planned", () => this.#draw());
    document.addEventListener("model", () => {
      sampling.refresh();
      this.#extrasOf = null;
      this.#mediaChanged();
    });
    document.addEventListener("key", async () => {
      this.clearNotice();
      media.items.filter((item) => item.error && item.file).forEach((item) => media.start(item));
    });
    document.addEventListener("subtitles", () => composer.draw());
    document.addEventListener("language", () => {
      this.#views.forEach((view) => view.turn.isDone && view.finish());
      composer.showRange(sampling.range);
      this.#draw();
      this.show(stage.turn);
    });
    window.addEventListener("beforeunload", (event) => this.#running && event.preventDefault());
  }

  // Files

  get isOpen() {
    return this.media.items.length > 0;
  }

  get hasTurns() {
    return this.#conversation.turns.length > 0;
  }

  /** Opens files of this machine: a video, pictures, or subtitles of what is open. */
  addFiles(files) {
    return addFiles(this, files);
  }

  /** Shows a file. */
  open(item) {
    this.stage.open(item);
    this.#draw();
    this.stage.show(this.stage.turn);
  }

  #mediaChanged() {
    const { items } = this.media;
    document.body.classList.toggle("empty", items.length === 0);
    if (!items.includes(this.stage.item)) {
      this.stage.open(items[0] ?? null);
      if (items.length) this.composer.open();
    }
    this.stage.refresh();
    this.#draw();
    const state = items.map(({ id }) => id ?? "waiting").join();
    if (state !== this.#planned) {
      this.sampling.refresh();
      if (items.length && this.media.ready) this.note();
      this.#openExtras();
    }
    this.#planned = state;
    this.#goOn();
  }

  /** Subtitles and scenes of the video, once it is on the server. */
  #openExtras() {
    const video = this.media.video?.id ? this.media.video : null;
    if (video === this.#extrasOf) return;
    this.#extrasOf = video;
    this.scenes.open(video);
    this.subtitles.open(video).catch((error) => this.notice(explain(error).join(" ")));
  }

  #draw() {
    this.#bar.draw(this.stage.item, this.#isBeyond() ? null : this.sampling.planned);
    this.composer.draw();
  }

  /** Closes what is open. */
  clear() {
    this.#running?.stop.abort();
    this.#takeBack();
    this.#conversation = newConversation();
    this.#views = [];
    this.sampling.reset();
    this.media.clear();
    byId("turns").replaceChildren();
    this.show(null);
    this.clearNotice();
    this.#count();
    noteRoute({ place: "desk" });
  }

  // Questions

  /** Whether what is open is longer than the model was measured on. */
  #isBeyond() {
    const measured = model()?.measured;
    const { video } = this.media;
    if (!measured || !video) return false;
    return (this.sampling.planned?.frames ?? 0) > measured || (video.duration ?? 0) > measured;
  }

  #makeTurn({ question, mode, route, effort }) {
    const turns = this.#conversation.turns;
    const way = route ?? (mode === "ask" ? "chat" : this.#isBeyond() && isAble("find") ? "search" : "ground");
    const facts = {
      model: model().id, sampling: this.sampling.values, video: this.media.video, event: question, media: this.media.items,
      turns, question, options: { ...options(), effort: effort ?? setting("effort"), subtitles: setting("subtitles") ? this.subtitles.choice : "none" },
    };
    const request = { chat: chatRequest, ground: groundRequest, search: findRequest }[way](facts);
    return {
      mode, route: way, question, request, at: Date.now(), answer: "", reasoning: "", moments: null, weaker: [], regions: [],
      evidence: null, plan: [], notes: [], media: this.media.items.map(({ id }) => id),
    };
  }

  /** Why nothing can be asked now, as a sentence; null where it can. */
  #whyNot(mode) {
    const broken = this.media.items.find((item) => item.error);
    if (broken?.file) return `${broken.name}: ${explain(broken.error).filter(Boolean).join(" ")}`;
    if (broken) return `${broken.name}: ${t("file.gone")}`;
    if (mode === "find" && !this.media.video) return t("find.video");
    return null;
  }

  async send({ question, mode }) {
    if (this.#waiting) return undefined;
    // The field that is wrong takes the focus, and its sentence stands beside it.
    if (this.media.video && this.sampling.problem) {
      chooseTab("details");
      return this.sampling.problem.field.focus();
    }
    const problem = this.#whyNot(mode);
    if (problem) {
      this.composer.text ||= question;
      return this.notice(problem);
    }
    this.composer.text = "";
    this.clearNotice();
    chooseTab("answers");
    if (!model()) await this.#loadModel();
    if (!this.media.ready || this.#running || !model()) return this.#wait(question, mode);
    return this.#ask({ question, mode });
  }

  async #loadModel() {
    try {
      await loadModel();
    } catch (error) {
      this.notice(explain(error).join(" "));
    }
  }

  async #ask(query) {
    const turn = this.#makeTurn(query);
    this.#conversation.turns.push(turn);
    this.#conversation.title ||= turn.question;
    await this.#run(turn, this.#addView(turn));
  }

  /** Shows a question that is asked as soon as its files are on the server and nothing else runs. */
  #wait(question, mode) {
    const view = this.#addView({ question, mode, answer: "", plan: [] });
    view.wait(t(this.media.ready ? "wait.turn" : "wait.file"), () => this.#takeBack());
    this.#waiting = { question, mode, view };
  }

  /** Puts a waiting question back into the field. */
  #takeBack() {
    if (!this.#waiting) return;
    const { view, question } = this.#waiting;
    this.#waiting = null;
    this.#removeView(view);
    this.composer.text ||= question;
  }

  /** Sends the waiting question once it can be, or restores it where a file was rejected. */
  async #goOn() {
    if (!this.#waiting) return;
    const { question, mode, view } = this.#waiting;
    const problem = this.#whyNot(mode);
    if (!problem && (!this.media.ready || this.#running || !model())) return;
    if (problem) {
      this.#takeBack();
      return this.notice(problem);
    }
    this.#waiting = null;
    this.#removeView(view);
    await this.#ask({ question, mode });
  }

  async #run(turn, view) {
    const mine = this.#conversation;
    const stop = new AbortController();
    const run = begin({ kind: turn.mode, title: turn.question, stop: () => this.stop() });
    this.#running = { stop, turn };
    mine.media = [...this.media.items];
    const release = follow(view.node);
    let reported = 0;
    await runTurn(turn, view, stop.signal, (progress) => {
      if (progress) return change(run, { share: progress.total ? progress.done / progress.total : null, left: progress.left });
      if (mine !== this.#conversation) return undefined;
      if (turn.moments.length > reported) say(summary({ ...turn, moments: turn.moments.slice(reported) }));
      if (reported === 0 && turn.moments.length) this.stage.present(turn);
      else this.stage.show(turn);
      return void (reported = turn.moments.length);
    });
    release();
    this.#running = null;
    end(run);
    if (setting("threshold") !== null && turn.route === "search" && !turn.failed) {
      divide(turn, setting("threshold"));
      view.finish();
    }
    keep(mine);
    if (mine !== this.#conversation) return;
    this.#finished(turn);
    this.#goOn();
  }

  #finished(turn) {
    this.#count();
    // The marks of the answer before stay where this one brought nothing, and the question can be changed and sent again.
    if (turn.failed) {
      if (turn.failed === "error" && !this.composer.text) this.composer.text = turn.question;
      return;
    }
    if (turn.moments?.length || !turn.stopped) this.stage.present(turn);
    this.#details();
    this.note(turn);
    if (setting("playFound") && turn.moments?.length) this.stage.play(turn.moments[0]);
  }

  #count() {
    setTab("answers", this.#conversation.turns.length || "");
  }

  /** Puts what is open into the address of the page, so that a reload and a copied address bring it back. */
  note(turn = this.stage.turn) {
    const file = this.stage.item?.id;
    if (document.body.dataset.place !== "desk") return;
    const [first] = turn?.moments ?? [];
    noteRoute(file ? { place: "desk", file, mode: turn?.mode, question: turn?.question, range: first ? [first.start, first.end] : null }
      : { place: "desk" });
  }

  // Turns

  show(turn) {
    this.stage.show(turn);
    this.#details();
  }

  #details() {
    drawDetails(this.stage.turn, this.stage.item, model(), {
      hasPictures: () => this.stage.thumbnails !== null, picture: (canvas, seconds) => this.#picture(canvas, seconds),
      seek: (seconds) => this.stage.jump(seconds), actions: this.actions,
    });
  }

  #picture(canvas, seconds) {
    const { thumbnails } = this.stage;
    if (thumbnails) thumbnails.request(seconds, canvas, { first: true });
    else this.stage.addEventListener("ready", () => canvas.isConnected && this.#picture(canvas, seconds), { once: true });
  }

  #addView(turn) {
    const focus = (act) => (own, ...rest) => {
      if (this.stage.turn !== own) this.show(own);
      act(...rest);
      // On a phone the answer stands below the player.
      byId("player").scrollIntoView({ block: "nearest" });
    };
    const view = new AnswerView(turn, {
      jump: focus((moment) => this.stage.jump(moment.start)), play: focus((moment) => this.stage.play(moment)),
      seek: focus((seconds) => this.stage.jump(seconds)), region: focus((index) => this.stage.chooseRegion(index)),
      picture: (canvas, seconds) => this.#picture(canvas, seconds), hasPictures: () => this.media.video !== null,
      save: (moments, source) => this.actions.save(moments, source),
      formats: (own, moment) => this.actions.formats(own, moment),
      more: (own, moment) => this.actions.more(own, moment), link: (own, moment) => this.actions.link(own, moment),
      details: focus(() => chooseTab("details")), again: (own) => this.#again(own), models: this.places.models,
      reword: (own) => {
        this.composer.text = own.question;
        this.composer.focus({ select: true });
      },
      closer: (own) => this.#ask({ question: own.question, mode: "find", route: "search", effort: own.route === "search" ? "high" : null }),
      canSearch: (own) => isAble("find") && this.media.ready && own.request?.effort !== "high",
      threshold: (own, value) => {
        divide(own, value);
        view.finish();
        this.show(own);
      },
      canExport: () => isAble("export") && this.media.ready,
      exporting: (own) => this.actions.exporting(own, own.moments),
      stop: () => this.stop(), isBack,
    });
    this.#views.push(view);
    byId("turns").append(view.node);
    return view;
  }

  #removeView(view) {
    view.node.remove();
    this.#views = this.#views.filter((other) => other !== view);
  }

  /** Removes an answer; for a while it can be brought back. */
  remove(turn) {
    const { turns } = this.#conversation;
    const mine = this.#conversation;
    const at = turns.indexOf(turn);
    const view = this.#views.find((each) => each.turn === turn);
    const next = view.node.nextSibling;
    turns.splice(at, 1);
    this.#removeView(view);
    if (this.stage.turn === turn) this.show(turns.at(-1) ?? null);
    this.#count();
    keep(mine);
    toast(t("deleted"), () => {
      if (mine !== this.#conversation) return;
      turns.splice(at, 0, turn);
      this.#views.push(view);
      byId("turns").insertBefore(view.node, next?.isConnected ? next : null);
      this.show(turn);
      this.#count();
      keep(mine);
    });
  }

  /** Sends a turn again in its place at the end. */
  async #again(turn) {
    if (this.#running) return;
    if (this.composer.text === turn.question) this.composer.text = "";
    this.#conversation.turns = this.#conversation.turns.filter((other) => other !== turn);
    this.#removeView(this.#views.find((view) => view.turn === turn));
    await this.#ask(turn);
  }

  /** Ends what runs: a search keeps what it has; asked twice, or where nothing can be kept, the connection is closed. */
  stop() {
    if (!this.#running) return;
    const { stop, turn } = this.#running;
    if (!turn.searchId || turn.isStopping) return stop.abort();
    turn.isStopping = true;
    stopSearch(turn.searchId).catch(() => stop.abort());
  }

  // Coming back

  /** Opens what an address names. A question is put into the field and not asked. */
  async openRoute({ file, mode, question, range: times }) {
    if (file && this.stage.item?.id !== file) {
      const kept = conversations().find(({ media }) => media.some(({ id }) => id === file));
      await this.reopen(kept ?? { ...newConversation(), media: [{ id: file, name: "", kind: "", bytes: null, duration: null }] });
    }
    if (!file || !this.isOpen) return;
    if (mode) this.composer.mode = mode;
    const turn = this.#conversation.turns.find((each) => each.question === question && each.mode === mode);
    if (turn) this.show(turn);
    else if (question) this.composer.text = question;
    if (times) this.stage.startAt(times[0]);
  }

  /** Opens a kept conversation with its files, as far as the server still has them. */
  async reopen(kept) {
    this.clear();
    this.#conversation = { ...kept, turns: [...kept.turns] };
    this.media.restore(kept.media);
    kept.turns.forEach((turn) => this.#addView(turn));
    this.#count();
    const mine = this.#conversation;
    for (const item of this.media.items) {
      await this.media.check(item);
      if (mine !== this.#conversation) return;
      if (!item.error) await this.#fetchBack(item);
    }
    this.show(mine.turns.at(-1) ?? null);
    this.composer.open();
    this.note();
  }

  /** Gives a kept file an address to be shown from: the server's own, or where that needs a key a copy here. */
  async #fetchBack(item) {
    item.isComing = false;
    try {
      if (item.kind === "video" && storedKey() === "") item.url = contentAddress(item.id);
      else if (item.bytes <= MAX_FETCH) item.url = URL.createObjectURL(await fileContent(item.id));
    } catch (error) {
      this.notice(explain(error).join(" "));
    }
    if (item === this.stage.item || this.stage.item === null) this.open(item);
  }

  notice(text) {
    const box = noteBox("wrong", "", text, button(t("close"), () => this.clearNotice(), { class: "link" }));
    byId("notice").replaceChildren(...box.childNodes);
    byId("notice").hidden = false;
  }

  clearNotice() {
    byId("notice").hidden = true;
  }

  stepMoment(direction) {
    const next = this.stage.timeline.neighbour(this.stage.player.time, direction);
    if (next) this.stage.jump(next.start);
  }
}

/** Keeps a growing node in sight until the user scrolls or the returned function is called. */
function follow(node) {
  let follows = true;
  const stop = () => (follows = false);
  const show = () => follows && node.scrollIntoView({ block: node.clientHeight > 400 ? "start" : "nearest" });
  const watch = new ResizeObserver(show);
  watch.observe(node);
  for (const type of ["wheel", "touchmove"]) window.addEventListener(type, stop, { passive: true });
  return () => {
    show();
    watch.disconnect();
    for (const type of ["wheel", "touchmove"]) window.removeEventListener(type, stop);
  };
}
