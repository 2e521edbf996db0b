/**
 * Draws the lanes of the timeline on canvases. Every function gets a canvas, data and `view`, the seconds from
 * `view[0]` to `view[1]` that the width shows. At any length of the video the work is bounded by the width.
 */

/** Seconds of a view from which cuts are drawn as a density of their own lane. */
export const CUT_LANE_FROM = 600;
/** Seconds between cells of pictures are this share of the video at least, so that a zoom step ends. */
const FINEST = 0.04;

/** A context of the size of its canvas in pixels of the layout, cleared. */
function fit(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function scale([start, end], width) {
  return (time) => (end > start ? ((time - start) / (end - start)) * width : 0);
}

/** Colours of tokens as they are now; a token itself holds one for either theme. */
const colors = new Map();
document.addEventListener("theme", () => colors.clear());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colors.clear());

function color(canvas, name) {
  if (!colors.has(name)) {
    canvas.style.color = `var(${name})`;
    colors.set(name, getComputedStyle(canvas).color);
  }
  return colors.get(name);
}

/** The cells of the pictures: `{left, width, time}`, the frame of each in its middle. They stay where they are in time. */
export function cells(view, width, duration, aspect, height) {
  const own = height * Math.min(4, Math.max(0.3, aspect));
  const length = view[1] - view[0];
  if (!(length > 0) || !(width > 0)) return { own, list: [] };
  const count = Math.max(1, Math.floor(width / own));
  // Cells divide the video evenly, so that they keep their places in time while the view is dragged.
  const parts = Math.max(1, Math.floor(duration / length + 1e-6));
  const step = Math.max(duration / count / parts, FINEST);
  const x = scale(view, width);
  const first = Math.floor(view[0] / step);
  const last = Math.min(Math.ceil(view[1] / step), Math.ceil(duration / step - 1e-6));
  const list = [];
  for (let i = first; i < last && list.length <= 2 * count + 2; i++) {
    list.push({ left: x(i * step), width: x((i + 1) * step) - x(i * step), time: Math.min((i + 0.5) * step, duration) });
  }
  return { own, list };
}

/** Draws the kept pictures of the cells and the cuts as edges. Returns whether all pictures were there. */
export function drawPictures(canvas, view, duration, thumbnails, cuts) {
  const { context, width, height } = fit(canvas);
  let isComplete = true;
  if (thumbnails?.aspect) {
    const { own, list } = cells(view, width, duration, thumbnails.aspect, height);
    for (const cell of list) {
      const picture = thumbnails.at(cell.time);
      if (!picture) isComplete = false;
      else context.drawImage(picture, cell.left + (cell.width - own) / 2, 0, own, height);
    }
  }
  if (cuts.length && view[1] - view[0] < CUT_LANE_FROM) {
    const x = scale(view, width);
    for (const time of cuts) {
      if (time < view[0] || time > view[1]) continue;
      context.fillStyle = color(canvas, "--surface");
      context.fillRect(x(time) - 2, 0, 4, height);
      context.fillStyle = color(canvas, "--text");
      context.fillRect(x(time) - 1, 0, 2, height);
    }
  }
  return isComplete && Boolean(thumbnails?.aspect);
}

/** Frames `{time, share}` as bars: each as wide as it reaches, or the largest of a pixel column where they are dense. */
export function drawEvidence(canvas, view, frames) {
  const { context, width, height } = fit(canvas);
  if (!frames?.length) return;
  const x = scale(view, width);
  const most = frames.reduce((high, frame) => Math.max(high, frame.share), 0) || 1;
  context.fillStyle = color(canvas, "--accent");
  context.globalAlpha = 0.72;
  const bar = (left, wide, share) => {
    const tall = Math.max(1, (share / most) * (height - 2));
    context.fillRect(left, height - tall, wide, tall);
  };
  const columns = new Float32Array(Math.ceil(width) + 1);
  const visible = frames.filter(({ time }) => time >= view[0] && time <= view[1]).length;
  if (visible > width / 3) {
    for (const { time, share } of frames) {
      const at = Math.round(x(time));
      if (at >= 0 && at <= width) columns[at] = Math.max(columns[at], share);
    }
    // Neighbouring columns share their height, so that a comb of single pixels becomes a shape.
    for (let at = 0; at < width; at += 2) bar(at, 2, Math.max(columns[at], columns[at + 1] ?? 0));
    return;
  }
  frames.forEach((frame, i) => {
    const before = i ? (frames[i - 1].time + frame.time) / 2 : frame.time - halfGap(frames, i);
    const after = i + 1 < frames.length ? (frame.time + frames[i + 1].time) / 2 : frame.time + halfGap(frames, i);
    const [left, right] = [Math.max(0, x(before)), Math.min(width, x(after))];
    if (right > left) bar(left, Math.max(1, right - left - 1), frame.share);
  });
}

function halfGap(frames, i) {
  if (frames.length < 2) return 0.5;
  const j = i ? i - 1 : 1;
  return Math.abs(frames[i].time - frames[j].time) / 2;
}

/** Where a frame was looked at: a thin line, a thick one where closely, hatched where not. */
export function drawSeen(canvas, view, coverage) {
  const { context, width, height } = fit(canvas);
  if (!coverage) return;
  const x = scale(view, width);
  const spans = (list, draw) => {
    for (const [start, end] of list) {
      const [left, right] = [Math.max(0, x(start)), Math.min(width, x(end))];
      if (right > 0 && left < width) draw(left, Math.max(4, right - left));
    }
  };
  context.fillStyle = color(canvas, "--edge");
  spans(coverage.seen.filter((span) => !span.close).map(({ start, end }) => [start, end]), (left, wide) => {
    context.fillRect(left, height / 2 - 1, wide, 2);
  });
  context.strokeStyle = color(canvas, "--edge");
  spans(coverage.unseen, (left, wide) => hatch(context, left, wide, height));
  context.fillStyle = color(canvas, "--accent");
  spans(coverage.seen.filter((span) => span.close).map(({ start, end }) => [start, end]), (left, wide) => {
    context.beginPath();
    context.roundRect(left, 1, wide, height - 2, 3);
    context.fill();
  });
}

function hatch(context, left, wide, height) {
  context.save();
  context.beginPath();
  context.rect(left, 0, wide, height);
  context.clip();
  context.beginPath();
  for (let at = left - height; at < left + wide; at += 5) {
    context.moveTo(at, height);
    context.lineTo(at + height, 0);
  }
  context.stroke();
  context.restore();
}

/** Times as bars of 4 pixels: how many fall there, against the most. */
export function drawDensity(canvas, view, times, name, { least = 0, marks = [] } = {}) {
  const { context, width, height } = fit(canvas);
  const x = scale(view, width);
  const bins = new Float32Array(Math.ceil(width / 4) + 1);
  for (const time of times) {
    const bin = Math.floor(x(time) / 4);
    if (bin >= 0 && bin < bins.length) bins[bin] += 1;
  }
  const most = bins.reduce((high, count) => Math.max(high, count), 0) || 1;
  context.fillStyle = color(canvas, name);
  bins.forEach((count, i) => {
    if (!count) return;
    context.globalAlpha = least ? least + (1 - least) * (count / most) : 1;
    const tall = least ? height - 4 : Math.max(2, (count / most) * height);
    context.fillRect(i * 4, least ? 2 : height - tall, 3, tall);
  });
  context.globalAlpha = 1;
  context.fillStyle = color(canvas, "--warn");
  for (const time of marks) context.fillRect(x(time) - 2, 0, 4, height);
}
