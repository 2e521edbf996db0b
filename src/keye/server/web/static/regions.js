/**
 * Draws the places that an answer marks over a picture. It draws what `data.regions` made safe.
 */

import { byId } from "./dom.js";

const SCALE = 1000;

export class RegionOverlay {
  #canvas = byId("regions");
  #image = byId("image");
  #regions = [];
  #chosen = -1;

  constructor() {
    new ResizeObserver(() => this.#draw()).observe(this.#image);
    this.#image.addEventListener("load", () => this.#draw());
  }

  show(regions) {
    this.#regions = regions;
    this.#chosen = -1;
    this.#draw();
  }

  /** Makes one region stand out; -1 for none. */
  choose(index) {
    this.#chosen = index;
    this.#draw();
  }

  #draw() {
    const ratio = window.devicePixelRatio || 1;
    const canvas = this.#canvas;
    const { clientWidth: width, clientHeight: height, offsetLeft, offsetTop } = this.#image;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    Object.assign(canvas.style, {
      width: `${width}px`, height: `${height}px`, left: `${offsetLeft}px`, top: `${offsetTop}px`,
    });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    this.#regions.forEach((region, i) => this.#shape(context, region, i, width, height));
  }

  #shape(context, region, index, width, height) {
    const corners = region.points.map(([x, y]) => [(x / SCALE) * width, (y / SCALE) * height]);
    const strong = this.#chosen < 0 || this.#chosen === index;
    context.globalAlpha = strong ? 1 : 0.35;
    const path = outline(region.kind, corners);
    // A dark line under the bright one keeps it visible on any picture.
    for (const [colour, line] of [["#000a", 5], ["#4fe3d6", 2.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.stroke(path);
    }
    this.#label(context, `${index + 1} ${region.label}`.trim(), corners[0], width);
  }

  #label(context, text, [x, y], width) {
    context.font = "600 13px system-ui, sans-serif";
    const wide = context.measureText(text).width + 10;
    const [left, top] = [Math.max(0, Math.min(x, width - wide)), Math.max(0, y - 20)];
    context.fillStyle = "#06302d";
    context.fillRect(left, top, wide, 20);
    context.fillStyle = "#ffffff";
    context.fillText(text, left + 5, top + 14);
  }
}

function outline(kind, corners) {
  const path = new Path2D();
  if (kind === "point" || corners.length === 1) path.arc(corners[0][0], corners[0][1], 7, 0, 2 * Math.PI);
  else if (kind === "box") {
    const [[left, top], [right, bottom]] = corners;
    path.rect(left, top, right - left, bottom - top);
  } else {
    corners.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
    path.closePath();
  }
  return path;
}
