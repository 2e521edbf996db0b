/** The page put together: places, what is dropped on them, keys, and the address. */

import { startActivity } from "./activity.js";
import { explain } from "./api.js";
import { Desk } from "./desk.js";
import { deskKeys } from "./deskkeys.js";
import { byId } from "./dom.js";
import { showModel, showPlace, startHeader } from "./header.js";
import { conversations } from "./history.js";
import { drawIcons } from "./icons.js";
import { useSample } from "./intake.js";
import { startKeyDialog } from "./keydialog.js";
import { startKeys } from "./keys.js";
import { libraryKeys, startLibrary } from "./library.js";
import { loadModel } from "./model.js";
import { startPanel } from "./panel.js";
import { go, PLACES, route } from "./router.js";
import { startSettings } from "./settings.js";
import { setting } from "./store.js";
import { preferredLanguage, setLanguage } from "./strings.js";
import { startWelcome } from "./welcome.js";

const ACCEPT = "video/*,image/*,.mkv,.avi,.ts,.m2ts,.flv,.wmv,.heic,.heif,.avif,.srt,.vtt";

function applyTheme() {
  const theme = setting("theme");
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("theme"));
}

function applyLanguage() {
  const chosen = setting("language");
  setLanguage(chosen === "auto" ? preferredLanguage() : chosen);
}

/** Shows the place of the address; on the desk also the file that it names. */
async function applyRoute(desk) {
  const target = route();
  for (const place of PLACES) byId(place).hidden = place !== target.place;
  showPlace(target.place);
  document.dispatchEvent(new CustomEvent("place", { detail: target }));
  if (target.place !== "desk") return;
  if (target.file) await desk.openRoute(target);
  else desk.note();
}

function startDropping(desk) {
  const add = (files) => {
    if (route().place !== "desk") go({ place: "desk" });
    desk.addFiles(files);
  };
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
    add(event.dataTransfer.files);
  });
  window.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) add(event.clipboardData.files);
  });
  for (const id of ["choose", "choose-more"]) {
    byId(id).accept = ACCEPT;
    byId(id).addEventListener("change", (event) => {
      if (event.target.files.length) add(event.target.files);
      event.target.value = "";
    });
  }
}

/** Esc closes the menu, else leaves the field, else stops what runs; menus and dialogs close themselves. */
function escape(desk) {
  if (document.activeElement instanceof HTMLElement && document.activeElement.matches("input, textarea, select")) {
    document.activeElement.blur();
  } else desk.stop();
}

function startControls(desk) {
  byId("before").addEventListener("click", () => desk.stepMoment(-1));
  byId("after").addEventListener("click", () => desk.stepMoment(1));
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId(desk.isOpen ? "turns" : "choose").focus();
  });
  for (const close of document.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => close.closest("dialog").close());
  }
  startKeys(() => ({
    go: (place) => go({ place }), escape: () => escape(desk), ...(route().place === "desk" ? deskKeys(desk) : {}),
    ...(route().place === "library" ? libraryKeys() : {}),
  }));
}

function start() {
  drawIcons(document);
  startKeyDialog();
  const desk = new Desk({ models: showModel });
  startPanel();
  startHeader();
  startWelcome({ sample: (example) => useSample(desk, example), reopen: (kept) => desk.reopen(kept) });
  startLibrary({
    open: go,
    add: () => byId("choose-more").click(),
  });
  startActivity({
    open: async (kept) => {
      await desk.reopen(kept);
      go({ place: "desk", file: desk.stage.item?.id });
    },
  });
  startSettings();
  startDropping(desk);
  startControls(desk);
  document.addEventListener("setting", (event) => {
    if (event.detail === "theme") applyTheme();
    if (event.detail === "language") applyLanguage();
  });
  document.addEventListener("key", () => loadModel().catch((error) => desk.notice(explain(error).join(" "))));
  window.addEventListener("hashchange", () => applyRoute(desk));
  applyTheme();
  applyLanguage();
  open(desk);
  document.body.dataset.ready = "yes";
}

/** The model, and what the address names; without a file there the last one. */
async function open(desk) {
  const [last] = conversations().filter(({ media }) => media.some(({ id }) => id));
  const target = route();
  applyRoute(desk);
  if (target.place === "desk" && !target.file && last) desk.reopen(last);
  try {
    await loadModel();
  } catch (error) {
    desk.notice(explain(error).join(" "));
  }
}

start();
