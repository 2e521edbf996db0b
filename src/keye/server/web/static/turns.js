/** Sends one turn to the server and fills it with what comes back. It knows turns and views, not the rest of the page. */

import { chat, explain, find, ground, isGone } from "./api.js";
import * as data from "./data.js";
import { StreamCut } from "./sse.js";
import { parseIntervals, pieces } from "./times.js";

/** Runs a turn by its `route`: "chat", "ground" or "search". Resolves when it ended, however it did. */
export async function runTurn(turn, view, signal, changed) {
  const began = performance.now();
  view.begin();
  const work = { chat: askTurn, ground: groundTurn, search: searchTurn }[turn.route];
  try {
    await work(turn, view, signal, changed);
  } catch (error) {
    if (signal.aborted) turn.stopped = true;
    else {
      turn.failed = isGone(error) ? "gone" : "error";
      turn.note = explain(error).join(" ");
    }
  }
  turn.seconds = (performance.now() - began) / 1000;
  // The last chunk has the intervals; of an answer that was cut off they are read from its text.
  if (turn.route !== "search" && !turn.moments) take(turn, parseIntervals(turn.answer).filter(([start, end]) => start < end));
  turn.isDone = true;
  view.finish();
}

/** Sets the moments of a turn to plain intervals, with the words that the answer gives them. */
function take(turn, pairs) {
  const labelled = pieces(turn.answer).filter((piece) => piece.kind === "interval");
  turn.moments = data.momentsOf(pairs, labelled);
}

async function askTurn(turn, view, signal) {
  for await (const chunk of chat(turn.request, signal)) {
    const step = data.progress(chunk?.keye?.progress);
    if (step) view.phase(step);
    takeDelta(turn, view, chunk?.choices?.[0]?.delta);
    if (chunk?.choices?.[0]?.finish_reason === "length") turn.isCut = true;
    if (chunk?.usage) takeUsage(turn, chunk.usage);
    if (chunk?.keye && !chunk.keye.progress) takeExtras(turn, chunk.keye);
  }
}

async function groundTurn(turn, view, signal) {
  let result = null;
  for await (const chunk of ground(turn.request, signal)) {
    const step = data.progress(chunk?.keye?.progress);
    if (step) view.phase(step);
    if (chunk?.object === "keye.ground") result = chunk;
  }
  if (!result) throw new StreamCut("cut");
  turn.answer = data.words(result.text, 100_000);
  takeUsage(turn, result.usage);
  takeExtras(turn, { intervals: result.intervals, ...result.keye });
  turn.presence = data.share(result.keye?.presence);
}

/** Looks through a long video: findings come ranked while it goes on. */
async function searchTurn(turn, view, signal, changed) {
  let isComplete = false;
  for await (const event of find(turn.request, signal)) {
    if (event?.type === "started") turn.searchId = data.words(event.id, 100);
    else if (event?.type === "waiting") view.waiting();
    else if (event?.type === "progress") {
      const step = data.searchProgress(event);
      if (step) {
        view.search(step);
        changed(step);
      }
    } else if (event?.type === "moments") {
      turn.moments = data.moments(event.moments);
      view.findings();
      changed(null);
    } else if (event?.type === "result") {
      takeResult(turn, event.result);
      isComplete = true;
    }
  }
  if (!isComplete) throw new StreamCut("cut");
}

function takeResult(turn, result) {
  turn.moments = data.moments(result?.moments);
  turn.weaker = data.moments(result?.weaker);
  turn.presence = data.share(result?.presence);
  turn.threshold = data.share(result?.threshold) ?? 0;
  turn.coverage = data.coverage(result?.coverage);
  turn.notes = data.notes(result?.notes);
  turn.stopped = result?.stopped === true;
  turn.durations = data.durations(result?.seconds);
}

/** Divides the moments of a search at `threshold`. */
export function divide(turn, threshold) {
  const all = [...turn.moments, ...(turn.weaker ?? [])].sort((a, b) => a.rank - b.rank);
  const isSure = ({ probability, checked }) => checked !== "failed" && (probability ?? 1) >= threshold;
  turn.threshold = threshold;
  turn.moments = all.filter(isSure);
  turn.weaker = all.filter((moment) => !isSure(moment));
}

function takeDelta(turn, view, delta) {
  if (typeof delta?.reasoning_content === "string") {
    turn.reasoning += delta.reasoning_content;
    view.think(delta.reasoning_content);
  }
  if (typeof delta?.content === "string" && delta.content) {
    turn.answer += delta.content;
    view.write(delta.content);
  }
}

function takeUsage(turn, usage) {
  turn.usage = { prompt: data.amount(usage?.prompt_tokens), generated: data.amount(usage?.completion_tokens) };
  turn.plan = data.plans(usage?.media).map(({ kind, frames, tokens, width, height }) => ({ kind, frames, tokens, width, height }));
}

function takeExtras(turn, extras) {
  if (extras.intervals) take(turn, data.intervals(extras.intervals));
  if (extras.regions) turn.regions = data.regions(extras.regions);
  if (extras.evidence) turn.evidence = data.evidence(extras.evidence);
  turn.attention = data.words(extras.attention, 20);
  turn.notes = data.notes(extras.coded_notes ?? extras.notes);
  turn.durations = data.durations(extras.seconds);
}
