/** Pointers and wheels on the timeline: jumping, drawing a range, moving and zooming the view. */

import { byId } from "./dom.js";

/** A pointer that moves less far than this clicks; one that moves further drags. */
const DRAG_PIXELS = 5;
/** Pixels at either edge of the window in the lane of all that change its length. */
const EDGE = 8;

export function startGestures(timeline) {
  onLanes(timeline);
  onOverview(timeline);
  onHandles(timeline);
}

function timeAt(timeline, event, box = byId("track"), [start, end] = timeline.view) {
  const { left, width } = box.getBoundingClientRect();
  return start + Math.min(1, Math.max(0, (event.clientX - left) / width)) * (end - start);
}

function rounded(range) {
  return range.map((time) => Math.round(time * 10) / 10);
}

/** Press jumps, drag on the pictures draws a range, two fingers zoom, the wheel zooms with Ctrl and pans with Shift. */
function onLanes(timeline) {
  const lanes = document.querySelector(".lanes");
  const pointers = new Map();
  let drag = null;

  lanes.addEventListener("pointerdown", (event) => {
    const body = event.target.closest(".lane-body");
    if (event.button !== 0 || !body || body.id === "whole" || event.target.closest("button, .selection span")) return;
    pointers.set(event.pointerId, event.clientX);
    drag = { x: event.clientX, time: timeAt(timeline, event), moved: false, draws: body.id === "track" };
    body.setPointerCapture(event.pointerId);
  });
  lanes.addEventListener("pointermove", (event) => {
    if (timeline.duration > 0) timeline.say("hover", { time: timeAt(timeline, event), x: event.clientX });
    if (!pointers.has(event.pointerId)) return;
    if (pointers.size === 2) return pinch(timeline, pointers, event);
    if (!drag) return;
    drag.moved ||= Math.abs(event.clientX - drag.x) > DRAG_PIXELS;
    if (!drag.moved) return;
    const now = timeAt(timeline, event);
    if (drag.draws) timeline.setRange(...[drag.time, now].sort((a, b) => a - b));
    else timeline.say("jump", now);
  });
  const release = (event) => {
    const wasPinch = pointers.size === 2;
    pointers.delete(event.pointerId);
    if (!drag) return;
    const { moved, draws } = drag;
    drag = null;
    if (wasPinch || event.type === "pointercancel") return;
    if (moved && draws) timeline.say("range", rounded(timeline.selected));
    else timeline.say("jump", timeAt(timeline, event));
  };
  lanes.addEventListener("pointerup", release);
  lanes.addEventListener("pointercancel", release);
  byId("timeline").addEventListener("pointerleave", () => timeline.say("hover", { time: null }));
  lanes.addEventListener("wheel", (event) => {
    const pixels = event.deltaX || event.deltaY;
    const length = timeline.view[1] - timeline.view[0];
    if (event.ctrlKey || event.metaKey) timeline.zoom(Math.exp(event.deltaY / 200), timeAt(timeline, event));
    else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      timeline.pan((pixels / byId("track").clientWidth) * length);
    } else return;
    event.preventDefault();
  }, { passive: false });
}

function pinch(timeline, pointers, event) {
  const before = [...pointers.values()];
  pointers.set(event.pointerId, event.clientX);
  const now = [...pointers.values()];
  const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(now[0] - now[1])];
  if (was < 10 || is < 10) return;
  timeline.zoom(was / is, timeAt(timeline, { clientX: (now[0] + now[1]) / 2 }));
}

/** The window in the lane of all: its middle moves the view, its edges change the length. */
function onOverview(timeline) {
  const lane = byId("whole");
  let drag = null;
  const at = (event) => timeAt(timeline, event, lane, [0, timeline.duration]);
  lane.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target.closest("button")) return;
    const box = byId("window").getBoundingClientRect();
    const [start, end] = timeline.view;
    const near = (x) => Math.abs(event.clientX - x) <= EDGE;
    if (near(box.left)) drag = { fixed: end };
    else if (near(box.right)) drag = { fixed: start };
    else if (event.clientX > box.left && event.clientX < box.right) drag = { offset: at(event) - start };
    else drag = { offset: (end - start) / 2 };
    lane.setPointerCapture(event.pointerId);
    move(event);
  });
  const move = (event) => {
    if (!drag) return;
    const time = at(event);
    if (drag.fixed !== undefined) timeline.see(...[drag.fixed, time].sort((a, b) => a - b));
    else timeline.see(time - drag.offset, time - drag.offset + timeline.view[1] - timeline.view[0]);
  };
  lane.addEventListener("pointermove", move);
  for (const type of ["pointerup", "pointercancel"]) lane.addEventListener(type, () => (drag = null));
}

/** The two handles of the range. */
function onHandles(timeline) {
  for (const [id, index] of [["range-start", 0], ["range-end", 1]]) {
    const handle = byId(id);
    let holds = false;
    handle.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      holds = true;
      handle.setPointerCapture(event.pointerId);
    });
    handle.addEventListener("pointermove", (event) => {
      if (!holds) return;
      const ends = [timeline.selected[0] ?? 0, timeline.selected[1] ?? timeline.duration];
      ends[index] = index ? Math.max(ends[0], timeAt(timeline, event)) : Math.min(ends[1], timeAt(timeline, event));
      timeline.setRange(...ends);
    });
    for (const type of ["pointerup", "pointercancel"]) {
      handle.addEventListener(type, () => {
        if (holds) timeline.say("range", rounded(timeline.selected.map((time, i) => time ?? (i ? timeline.duration : 0))));
        holds = false;
      });
    }
  }
}
