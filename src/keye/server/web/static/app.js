/**
 * The page put together: what the user does becomes turns of a conversation, and turns are shown and kept.
 */

import { AnswerView } from "./answer.js";
import { clips, explain, fileContent, models, sampleFile, storedKey } from "./api.js";
import { askTurn, findTurn } from "./ask.js";
import * as data from "./data.js";
import { button, byId, download, element } from "./dom.js";
import { conversations, forget, forgetAll, keep, newConversation } from "./history.js";
import { kindOf, MAX_MEDIA, Media } from "./media.js";
import { chatRequest, curl, groundRequest } from "./request.js";
import { Sampling } from "./sampling.js";
import { options, startSettings } from "./settings.js";
import { Stage } from "./stage.js";
import { clock } from "./times.js";

/** A kept video up to this many bytes is fetched for the player when its conversation is opened again. */
const MAX_FETCH = 256 * 1024 * 1024;

const media = new Media();
const stage = new Stage(media);
const sampling = new Sampling(() => ({
  model: model(), media: media.ready ? media.items : null, duration: media.video?.duration ?? null,
}));
let conversation = newConversation();
let running = null;
/** A question that waits until its media are on the server: `{question, mode, view}`. */
let waiting = null;

function model() {
  return byId("model").value;
}

// Media

function addFiles(files) {
  const usable = [...files].filter((file) => kindOf(file));
  if (!usable.length) {
    return notice("This is neither a video nor a picture that keye knows.", "Drop an mp4, mov, mkv or webm file.");
  }
  const missing = media.items.find((item) => item.error && !item.file);
  if (missing && kindOf(usable[0]) === missing.kind) {
    media.attach(missing, usable[0]);
    return stage.open(missing);
  }
  if (conversation.turns.length || (media.video && usable.some((file) => kindOf(file) === "video"))) startAnew();
  let videos = 0;
  for (const file of usable.slice(0, MAX_MEDIA - media.items.length)) {
    if (kindOf(file) === "video" && videos++) continue;
    media.add(file);
  }
  stage.open(media.video ?? media.items[0]);
  if (videos > 1) notice("One video at a time.", "The first one was taken.");
  else clearNotice();
  byId("question").focus();
}

/** Opens the sample clip, and asks `question` about it if there is one. */
async function useSample(question = "") {
  try {
    addFiles([await sampleFile()]);
  } catch (error) {
    return notice(...explain(error));
  }
  if (!question) return undefined;
  byId("question").value = question;
  return send();
}

/** The questions that the model in use answers about the sample, as buttons. */
function showExamples(found) {
  const examples = data.sentences(found.find((one) => one.id === model())?.keye?.examples).slice(0, 4);
  const label = byId("examples").firstChild;
  byId("examples").replaceChildren(label, ...examples.map((text) => button(text, () => useSample(text))));
  byId("examples").hidden = !examples.length;
}

function startAnew() {
  running?.abort();
  takeBack();
  conversation = newConversation();
  media.clear();
  sampling.setRange(null, null);
  byId("turns").replaceChildren();
  stage.show(null);
  clearNotice();
}

// Questions

function makeTurn(question, mode) {
  const given = { model: model(), sampling: sampling.values, options: options() };
  const turns = conversation.turns.filter((turn) => !turn.failed);
  const request = mode === "find"
    ? groundRequest({ ...given, video: media.video, event: question })
    : chatRequest({ ...given, media: media.items, turns, question });
  return { mode, question, request, answer: "", reasoning: "", intervals: null, regions: [], evidence: null, plan: [] };
}

/** Why nothing can be asked now, as sentences; null where it can. */
function whyNot(mode) {
  const failed = media.items.find((item) => item.error);
  if (failed?.file) return [`${failed.name}:`, ...explain(failed.error)];
  if (failed) return [`${failed.name} is not on the server.`, "Drop the file again."];
  if (mode === "find" && !media.video) return ["Finding needs a video.", "Drop one."];
  return null;
}

async function send() {
  if (!model()) await loadModels();
  const question = byId("question").value.trim();
  const mode = document.querySelector("input[name=mode]:checked").value;
  if (running || waiting || !question) return;
  // The field that is wrong takes the focus, and its sentence stands beside it.
  if (media.video && sampling.problem) return void sampling.showProblem();
  const problem = whyNot(mode);
  if (problem) return void notice(...problem);
  byId("question").value = "";
  clearNotice();
  if (!media.ready) return wait(question, mode);
  await ask(question, mode);
}

async function ask(question, mode) {
  const turn = makeTurn(question, mode);
  conversation.turns.push(turn);
  conversation.title ||= turn.question;
  await run(turn, addView(turn));
}

/** Shows a question that is asked as soon as its media are on the server. */
function wait(question, mode) {
  const view = addView({ question, mode, answer: "", plan: [] });
  view.wait("Your question is asked as soon as the file is ready.", takeBack);
  waiting = { question, mode, view };
}

/** Puts a waiting question back into the field. */
function takeBack() {
  if (!waiting) return;
  waiting.view.node.remove();
  byId("question").value ||= waiting.question;
  waiting = null;
}

/** Sends the waiting question once its files are ready, or restores it where a file was rejected. */
async function goOn() {
  if (!waiting) return;
  const { question, mode, view } = waiting;
  const problem = whyNot(mode);
  if (!problem && !media.ready) return;
  if (problem) {
    takeBack();
    return notice(...problem);
  }
  waiting = null;
  view.node.remove();
  await ask(question, mode);
}

async function run(turn, view) {
  running = new AbortController();
  const mine = conversation;
  mine.media = [...media.items];
  showRunning();
  const release = follow(view.node);
  await (turn.mode === "find" ? findTurn : askTurn)(turn, view, running.signal);
  release();
  running = null;
  showRunning();
  keep(mine);
  if (mine !== conversation) return;
  // The marks of the answer before stay where this one brought nothing, and the question can be changed and sent again.
  if (turn.answer) {
    stage.show(turn);
    if (turn.intervals?.length && !stage.player.playing) stage.jump(turn.intervals[0][0]);
  }
  else if (turn.failed && !byId("question").value) byId("question").value = turn.question;
}

/** Keeps the end of a growing node in sight until the user scrolls or the returned function is called. */
function follow(node) {
  let follows = true;
  const stop = () => (follows = false);
  const show = () => follows && node.scrollIntoView({ block: node.clientHeight > 400 ? "end" : "nearest" });
  const watch = new ResizeObserver(show);
  watch.observe(node);
  for (const type of ["wheel", "touchmove"]) window.addEventListener(type, stop, { passive: true });
  return () => {
    show();
    watch.disconnect();
    for (const type of ["wheel", "touchmove"]) window.removeEventListener(type, stop);
  };
}

function showRunning() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function addView(turn) {
  const view = new AnswerView(turn, {
    jump: (seconds) => {
      stage.jump(seconds);
      // On a phone the answer stands below the player.
      byId("player").scrollIntoView({ block: "nearest" });
    },
    play: (interval) => {
      stage.playMoment(interval);
      byId("player").scrollIntoView({ block: "nearest" });
    },
    range: (interval) => sampling.setRange(...interval),
    focus: (focused) => stage.show(focused),
    region: (focused, index) => {
      stage.show(focused);
      stage.chooseRegion(index);
    },
    clips: saveClips,
    curl: ({ mode, request }) => {
      const path = mode === "find" ? "v1/video/ground" : "v1/chat/completions";
      return curl(new URL(path, location.href).href, request, storedKey() !== "");
    },
    again: (failed) => again(failed, view),
  });
  byId("turns").append(view.node);
  return view;
}

/** Sends a turn again in its place at the end. */
async function again(turn, view) {
  if (running) return;
  if (byId("question").value === turn.question) byId("question").value = "";
  conversation.turns = conversation.turns.filter((other) => other !== turn);
  view.node.remove();
  const empty = { answer: "", reasoning: "", note: "", intervals: null, regions: [], evidence: null, failed: false };
  const fresh = { ...turn, ...empty };
  conversation.turns.push(fresh);
  await run(fresh, addView(fresh));
}

async function saveClips(intervals, source) {
  const video = media.video;
  if (!video?.id) return notice("The video is not on the server.", "Drop the file again.");
  source.disabled = true;
  try {
    const blob = await clips(video.id, intervals);
    const stem = video.name.replace(/\.[^.]*$/, "").replaceAll(/[^\p{L}\p{N}_-]+/gu, "-").slice(0, 60) || "clip";
    const times = intervals[0].map((time) => clock(time).replaceAll(":", "m")).join("-");
    download(blob, intervals.length === 1 ? `${stem}-${times}.mp4` : `${stem}-clips.zip`);
  } catch (error) {
    notice(...explain(error));
  } finally {
    source.disabled = false;
  }
}

// History

function names(kept) {
  return kept.media.map(({ name }) => name);
}

function openHistory() {
  const rows = conversations().map((kept) => element(
    "li", {},
    button(kept.title || "Conversation", () => reopen(kept), { class: "name" }),
    element("span", { class: "state", text: [new Date(kept.created).toLocaleString(), ...names(kept)].join(" · ") }),
    button("Delete", () => {
      forget(kept.id);
      openHistory();
    }, { class: "quiet", "aria-label": `Delete ${kept.title}` }),
  ));
  byId("history-list").replaceChildren(...rows);
  byId("history-empty").hidden = rows.length > 0;
  byId("history-clear").hidden = rows.length === 0;
  if (!byId("history").open) byId("history").showModal();
}

async function reopen(kept) {
  byId("history").close();
  startAnew();
  conversation = { ...kept };
  media.restore(kept.media);
  const views = kept.turns.map(addView);
  stage.show(views.at(-1)?.turn ?? null);
  for (const item of media.items) {
    await media.check(item);
    if (item.error) notice(`${item.name} is no longer on the server.`, "Drop the same file to go on with it.");
    else if (item.bytes <= MAX_FETCH) await fetchBack(item);
  }
  stage.show(views.at(-1)?.turn ?? null);
}

async function fetchBack(item) {
  try {
    item.url = URL.createObjectURL(await fileContent(item.id));
    stage.open(item);
  } catch (error) {
    notice(...explain(error));
  }
}

// Notices, models and the start

function notice(...sentences) {
  byId("notice-text").textContent = sentences.filter(Boolean).join(" ");
  byId("notice").hidden = false;
}

function clearNotice() {
  byId("notice").hidden = true;
}

async function loadModels() {
  try {
    const found = (await models()).filter((one) => data.words(one?.id));
    byId("model").replaceChildren(...found.map((one) => {
      const context = data.amount(one.keye?.context);
      const size = context ? ` (${context.toLocaleString("en")} tokens)` : "";
      return element("option", { value: one.id, text: one.id + size });
    }));
    byId("model").disabled = found.length < 2;
    showExamples(found);
  } catch (error) {
    notice(...explain(error));
  }
}

function startDropping() {
  for (const type of ["dragenter", "dragover"]) {
    window.addEventListener(type, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    });
  }
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  window.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
  window.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
  });
  for (const id of ["choose", "choose-more"]) {
    byId(id).addEventListener("change", (event) => {
      if (event.target.files.length) addFiles(event.target.files);
      event.target.value = "";
    });
  }
}

function startAsking() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  for (const choice of document.querySelectorAll("input[name=mode]")) {
    choice.addEventListener("change", () => {
      byId("question").placeholder = choice.value === "find" ? "What to find, for example: the red circle" : "Ask about it";
    });
  }
  byId("stop").addEventListener("click", () => running?.abort());
}

function startKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      if (running) running.abort();
      else byId("question").blur();
    }
    const typing = event.target instanceof Element && event.target.closest("input, textarea, select, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const [start, end] = sampling.range;
    const actions = {
      "/": () => byId("question").focus(),
      "?": () => byId("keys").showModal(),
      "[": () => sampling.setRange(stage.player.time, end),
      "]": () => sampling.setRange(start, stage.player.time),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
}

/** Plans again when the media that are on the server change, not at every step of an upload. */
function startPlanning() {
  let planned = "";
  media.addEventListener("change", () => {
    byId("advanced").hidden = !media.video;
    const state = media.items.map((item) => item.id ?? "waiting").join();
    if (state !== planned) sampling.refresh();
    planned = state;
    goOn();
  });
  sampling.addEventListener("range", () => {
    stage.timeline.setRange(...sampling.range);
    byId("send").setAttribute("aria-disabled", String(sampling.problem !== null));
  });
  sampling.addEventListener("planned", (event) => stage.timeline.setFrames(event.detail));
  stage.timeline.addEventListener("range", (event) => sampling.setRange(...event.detail));
  byId("model").addEventListener("change", () => sampling.refresh());
}

function start() {
  startSettings();
  startDropping();
  startAsking();
  startKeys();
  startPlanning();
  byId("sample").addEventListener("click", () => useSample());
  byId("new").addEventListener("click", startAnew);
  byId("open-history").addEventListener("click", openHistory);
  byId("open-keys").addEventListener("click", () => byId("keys").showModal());
  byId("history-clear").addEventListener("click", () => {
    forgetAll();
    openHistory();
  });
  byId("notice-close").addEventListener("click", clearNotice);
  document.addEventListener("key", async () => {
    clearNotice();
    await loadModels();
    media.items.filter((item) => item.error && item.file).forEach((item) => media.start(item));
  });
  for (const close of document.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => close.closest("dialog").close());
  }
  window.addEventListener("beforeunload", (event) => running && event.preventDefault());
  document.body.dataset.ready = "yes";
  loadModels();
}

start();
