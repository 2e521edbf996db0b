/** The line at the top of every place: the places, what runs, the model with its scope, the other language, the keys. */

import { byId, button, element } from "./dom.js";
import { icon } from "./icons.js";
import { placeBy } from "./menu.js";
import { model } from "./model.js";
import { runs } from "./runs.js";
import { set } from "./store.js";
import { language, left, percent, plural, said, t } from "./strings.js";
import { larger } from "./welcome.js";

export function startHeader() {
  byId("language").addEventListener("click", () => set("language", language() === "en" ? "zh" : "en"));
  for (const [opener, box, fill] of [["model", "model-box", modelBox], ["running", "running-box", runningBox]]) {
    byId(opener).addEventListener("click", () => openModel(byId(opener), box, fill));
    byId(box).addEventListener("toggle", (event) => {
      byId(opener).setAttribute("aria-expanded", String(event.newState === "open"));
    });
  }
  document.addEventListener("language", draw);
  document.addEventListener("model", draw);
  document.addEventListener("runs", drawRuns);
  draw();
}

/** Opens what is known of the model beside `anchor`. */
export function showModel(anchor) {
  openModel(anchor, "model-box", modelBox);
}

function openModel(anchor, id, fill) {
  const box = byId(id);
  if (box.matches(":popover-open")) return box.hidePopover();
  box.replaceChildren(...fill());
  box.showPopover();
  placeBy(box, anchor);
  return box.querySelector("button, a")?.focus();
}

export function showPlace(place) {
  document.body.dataset.place = place;
  for (const link of document.querySelectorAll(".places a")) {
    if (link.dataset.to === place) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("place-title").textContent = t(`place.${place}`);
}

function draw() {
  const loaded = model();
  const opener = byId("model");
  opener.hidden = !loaded;
  if (loaded) {
    opener.replaceChildren(
      element("span", { class: "name", text: loaded.id }),
      ...(loaded.short ? [element("span", { class: "chip warn", text: said(loaded.short) })] : []), element("span", { class: "long" }, icon("down")),
      ...(loaded.short ? [] : [element("span", { class: "short" }, icon("info"))]),
    );
    opener.setAttribute("aria-haspopup", "dialog");
    opener.setAttribute("aria-label", [t("model.title"), loaded.id, said(loaded.short)].filter(Boolean).join(", "));
  }
  const other = language() === "en" ? ["zh-CN", "中文"] : ["en", "English"];
  [byId("language").lang, byId("language").textContent] = other;
  if (document.body.dataset.place) byId("place-title").textContent = t(`place.${document.body.dataset.place}`);
  drawRuns();
}

function drawRuns() {
  const running = runs();
  byId("running").hidden = !running.length;
  byId("running").textContent = plural("running", running.length);
  if (byId("running-box").matches(":popover-open")) byId("running-box").replaceChildren(...runningBox());
}

/** The rows of what runs, each with a bar and Stop; also for Activity. */
export function runningRows() {
  return runs().map((run) => {
    const fill = element("span");
    fill.style.width = `${(run.share ?? 0) * 100}%`;
    const bar = element("span", {
      class: "bar-box", role: "progressbar", "aria-label": run.title, "aria-valuenow": Math.round((run.share ?? 0) * 100),
    }, fill);
    const facts = [run.share === null ? "" : percent(run.share), run.left === null ? "" : left(run.left)];
    return element("li", { class: "run" },
      element("div", { class: "row" }, element("span", { class: "chip tint", text: t(`kind.${run.kind}`) }),
        element("b", { class: "cut-text", text: run.title, title: run.title })),
      element("div", { class: "row" }, bar, element("span", { class: "soft figure", text: facts.filter(Boolean).join(", ") }),
        run.stop ? button(t("stop"), () => run.stop(), { icon: "stop" }) : null));
  });
}

function runningBox() {
  const rows = runningRows();
  return [element("h2", { text: t("running.title") }), rows.length ? element("ul", { class: "runs" }, ...rows)
    : element("p", { class: "soft", text: t("running.nothing") })];
}

function modelBox() {
  const { id, short, text, measured, context } = model();
  const list = element("dl", { class: "facts-list" });
  const add = (key, value) => list.append(element("dt", { text: t(key) }), element("dd", { text: value }));
  if (measured) add("model.measured", plural("frames", measured));
  if (context) add("model.context", plural("tokens", context));
  return [
    element("div", { class: "row" }, element("h2", { text: id }), short ? element("span", { class: "chip warn", text: said(short) }) : null),
    ...(text ? [element("p", { text: said(text) })] : []), list, ...larger(model()),
  ];
}
