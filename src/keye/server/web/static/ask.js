/**
 * Sends one turn to the server and fills it with what comes back. It knows turns and views, not the rest of the page.
 */

import { chat, explain, ground } from "./api.js";
import * as data from "./data.js";
import { StreamCut } from "./sse.js";
import { parseIntervals } from "./times.js";

/** Asks a question as a stream. The turn holds what came, also when it was stopped or broke off. */
export async function askTurn(turn, view, signal) {
  await guarded(turn, view, signal, async () => {
    for await (const chunk of chat(turn.request, signal)) takeChunk(turn, view, chunk);
  });
}

/** Looks for an event in the video. */
export async function findTurn(turn, view, signal) {
  await guarded(turn, view, signal, async () => {
    let result = null;
    for await (const chunk of ground(turn.request, signal)) {
      const step = data.progress(chunk?.keye?.progress);
      if (step) view.progress(step);
      takeDelta(turn, view, chunk?.delta);
      if (chunk?.object === "keye.ground") result = chunk;
    }
    if (!result) throw new StreamCut("The answer broke off before its end.");
    turn.answer = data.words(result.text, 100_000);
    takeUsage(turn, result.usage);
    takeExtras(turn, result.keye ?? {});
    turn.intervals = data.intervals(result.intervals);
    if (!turn.intervals.length) turn.note = "The model found no such moment. Other words or a shorter range may help.";
  });
}

async function guarded(turn, view, signal, work) {
  const began = performance.now();
  view.begin();
  try {
    await work();
  } catch (error) {
    if (signal.aborted) turn.note = "Stopped.";
    else turn.note = explain(error).join(" ");
    turn.failed = !signal.aborted;
  }
  turn.seconds = (performance.now() - began) / 1000;
  // The last chunk has the intervals; of an answer that was cut off they are read from its text.
  turn.intervals ??= parseIntervals(turn.answer);
  // A reply that repeated itself ends like one that was too long; its note says which it was.
  const looped = turn.notes?.some((note) => note.includes("repeated itself"));
  if (turn.cut && !looped) turn.note ||= "Cut at the token limit; raise it under Settings.";
  view.finish();
}

function takeChunk(turn, view, chunk) {
  const step = data.progress(chunk?.keye?.progress);
  if (step) view.progress(step);
  takeDelta(turn, view, chunk?.choices?.[0]?.delta);
  if (chunk?.choices?.[0]?.finish_reason === "length") turn.cut = true;
  if (chunk?.usage) takeUsage(turn, chunk.usage);
  if (chunk?.keye && !chunk.keye.progress) takeExtras(turn, chunk.keye);
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
  turn.plan = data.plans(usage?.media).map(({ kind, frames, tokens }) => ({ kind, frames, tokens }));
}

function takeExtras(turn, extras) {
  if (extras.intervals) turn.intervals = data.intervals(extras.intervals);
  if (extras.regions) turn.regions = data.regions(extras.regions);
  if (extras.evidence) turn.evidence = data.evidence(extras.evidence);
  turn.attention = data.words(extras.attention, 20);
  turn.notes = data.sentences(extras.notes);
}
