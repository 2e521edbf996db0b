/** The scenes of a video: found when asked for, as every frame is decoded for it; as cuts on the timeline and as a list. */

import { scenes as scan } from "./api.js";
import * as data from "./data.js";
import { byId, element } from "./dom.js";
import { setTab } from "./panel.js";
import { begin, change, end } from "./runs.js";
import { t, time } from "./strings.js";

const MOST = 5000;

export class Scenes {
  #stage;
  #scenes = [];
  #item = null;
  #watch = null;

  constructor(stage) {
    this.#stage = stage;
    document.addEventListener("language", () => this.#draw());
  }

  /** Forgets the scenes of the file before. */
  open(item) {
    this.#item = item;
    this.#scenes = [];
    this.#stage.timeline.setCuts([]);
    setTab("scenes", null);
    this.#draw();
  }

  /** Looks for cuts in the open video. */
  async find() {
    const item = this.#item;
    const stop = new AbortController();
    const run = begin({ kind: "scenes", title: item.name, stop: () => stop.abort() });
    try {
      for await (const event of scan({ video: { file_id: item.id }, stream: true }, stop.signal)) {
        const step = data.searchProgress(event);
        if (step) change(run, { share: step.total ? step.done / step.total : null, left: step.left });
        if (event?.type === "result" && item === this.#item) this.#take(event.result);
      }
    } catch (error) {
      if (!stop.signal.aborted) throw error;
    } finally {
      end(run);
    }
  }

  #take(result) {
    const cuts = (Array.isArray(result?.cuts) ? result.cuts : []).filter((at) => data.amount(at) !== null).slice(0, MOST);
    const pairs = (Array.isArray(result?.scenes) ? result.scenes : []).map((scene) => [scene?.start, scene?.end]);
    this.#scenes = data.intervals(pairs);
    this.#stage.timeline.setCuts(cuts);
    setTab("scenes", this.#scenes.length || null);
    this.#draw();
  }

  #draw() {
    this.#watch?.disconnect();
    // Pictures are asked for once a scene comes into view.
    this.#watch = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        this.#watch.unobserve(target);
        this.#stage.thumbnails?.request(Number(target.dataset.middle), target);
      }
    });
    const rows = this.#scenes.map(([start, stop], i) => {
      const canvas = element("canvas", { width: 272, height: 153, "aria-hidden": "true", "data-middle": (start + stop) / 2 });
      this.#watch.observe(canvas);
      return element("button", {
        type: "button", "aria-label": t("scene.name", { number: i + 1, time: time(start) }),
        on: { click: () => this.#stage.jump(start) },
      }, canvas, element("span", { text: time(start) }));
    });
    byId("panel-scenes").replaceChildren(...(rows.length ? [element("div", { class: "scenes-list" }, ...rows)] : []));
  }
}
