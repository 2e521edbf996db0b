/** Library: the videos of the server's folders with the state of their index, the files that were uploaded, and a search
 * over all of them. */

import { changeFolder, explain, files, libraryEvents, ServerError } from "./api.js";
import * as data from "./data.js";
import { byId, button, element, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { toast } from "./notices.js";
import { Results } from "./results.js";
import { go, route } from "./router.js";
import { bytes, left, percent, plural, t, time, when } from "./strings.js";

const STATES = ["indexed", "indexing", "discovered", "failed"];

let library = null;
let uploads = [];
let problem = "";
let filter = "all";
let watching = null;

/** `handlers`: `open(target)` of a route on the desk, `add()`. */
export function startLibrary(handlers) {
  const results = new Results({ open: handlers.open, draw });
  const refresh = () => {
    if (!byId("library").hidden) draw();
  };
  for (const type of ["language", "model"]) document.addEventListener(type, refresh);
  document.addEventListener("place", (event) => {
    watching?.abort();
    if (event.detail.place !== "library") return;
    results.take(event.detail);
    draw();
    watch();
    files().then((list) => (uploads = list), (error) => (problem = explain(error).join(" "))).then(refresh);
  });

  /** Follows the library while its place is open. */
  async function watch() {
    watching = new AbortController();
    const { signal } = watching;
    try {
      for await (const event of libraryEvents(signal)) {
        apply(event);
        refresh();
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ServerError) || error.status !== 404) problem = explain(error).join(" ");
      library = null;
      refresh();
    }
  }

  function draw() {
    const focused = document.activeElement?.id;
    const isShown = results.isShown;
    byId("library").replaceChildren(
      element("h1", { text: t("place.library") }), ...(library ? [searchRow(handlers)] : [head(handlers)]),
      ...(isShown ? results.nodes() : list(handlers)),
    );
    if (focused) document.getElementById(focused)?.focus();
  }
}

function apply(event) {
  if (event?.type === "library") library = { videos: new Map() };
  if (!library) return;
  const { videos = [], removed = [] } = event ?? {};
  for (const video of Array.isArray(videos) ? videos.map(data.entry).filter(Boolean) : []) library.videos.set(video.id, video);
  for (const id of Array.isArray(removed) ? removed : []) library.videos.delete(id);
  library.folders = Array.isArray(event.folders) ? event.folders : [];
  library.bytes = data.amount(event.bytes) ?? 0;
  library.limit = data.amount(event.limit);
  library.mayManage = event.may_manage === true;
  library.indexing = event.indexing ?? null;
}

function head(handlers) {
  return element("div", { class: "row" }, element("p", { class: "soft", text: t("library.start") }), element("code", { text: "keye serve --library" }),
    element("span", { class: "space" }), button(t("library.add"), () => handlers.add(), { icon: "upload" }));
}

/** One field over everything. */
function searchRow(handlers) {
  const hours = [...library.videos.values()].reduce((sum, video) => sum + (video.duration ?? 0), 0) / 3600;
  const field = element("input", {
    type: "search", id: "library-question", value: route().question, maxlength: 2000, "aria-label": t("library.find"),
    placeholder: plural("library.find.hours", Math.max(1, Math.round(hours))),
  });
  const form = element("form", { class: "search-row" }, field,
    element("button", { type: "submit", class: "primary", text: t("mode.find") }),
    button(t("library.add"), () => handlers.add(), { icon: "upload" }),
    ...(library.mayManage ? [button(t("library.folder"), addFolder, { icon: "folder" })] : []));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = field.value.trim();
    go({ place: "library", question });
  });
  return form;
}

async function addFolder() {
  const path = window.prompt(t("library.folder.path"));
  if (!path) return;
  try {
    await changeFolder(path.trim(), true);
    toast(t("library.folder.added"));
  } catch (error) {
    toast(explain(error).join(" "));
  }
}

function list(handlers) {
  const videos = [...(library?.videos.values() ?? [])];
  const shown = filter === "all" ? videos : videos.filter(({ state }) => state === filter);
  const rows = [
    ...shown.map((video) => videoRow(video, handlers)),
    ...(filter === "all" ? uploads.map((file) => uploadRow(file, handlers)).filter(Boolean) : []),
  ];
  return [
    ...(videos.length ? [filters(videos)] : []),
    rows.length ? element("ul", { class: "list" }, ...rows) : element("p", { class: "list nothing", text: problem || t("library.empty") }),
    element("p", { class: "hint", text: t(library ? "library.read" : "library.kept") }), ...folders(),
  ];
}

function filters(videos) {
  const present = ["all", ...STATES.filter((state) => videos.some((video) => video.state === state))];
  const radios = present.map((name) => element("label", {}, element("input", {
    type: "radio", name: "library-filter", value: name, id: `filter-${name}`, checked: name === filter,
    on: { change: () => {
      filter = name;
      document.dispatchEvent(new Event("model"));
    } },
  }), element("span", {}, t(`state.${name}`),
    element("b", { class: "count", text: String(name === "all" ? videos.length : videos.filter(({ state }) => state === name).length) }))));
  const used = element("span", { class: "soft figure", text: t("library.used", { used: bytes(library.bytes), limit: bytes(library.limit ?? 0) }) });
  const meter = element("meter", { min: 0, max: library.limit ?? 1, value: library.bytes, "aria-label": t("library.used.name") });
  return element("div", { class: "row" }, element("div", { class: "segments" }, ...radios), element("span", { class: "space" }),
    ...(library.limit ? [used, meter] : []));
}

function videoRow(video, handlers) {
  const { id, name, state, reason, duration, searchable, bytes: size } = video;
  const running = library.indexing?.id === id ? data.searchProgress(library.indexing) : null;
  const facts = [
    duration === null ? "" : time(duration, 0), size ? bytes(size) : "",
    searchable && state !== "indexed" ? t("library.upto", { time: time(searchable, 0) }) : "", state === "failed" ? reason : "",
  ];
  const share = running?.total ? running.done / running.total : null;
  const now = share === null ? "" : [percent(share), running.left === null ? "" : left(running.left)].filter(Boolean).join(", ");
  const kinds = { indexed: "tint", failed: "wrong", indexing: "calm", discovered: "" };
  return element(
    "li", {},
    element("span", {}, element("span", { class: `chip ${kinds[state]}` }, state === "indexed" ? icon("check") : state === "failed" ? icon("warning") : null,
      t(`state.${state}`))),
    element("div", { class: "main" }, button(name, () => handlers.open({ place: "desk", file: id }), { class: "title" }),
      element("span", { class: "soft figure", text: facts.filter(Boolean).join(" · ") })),
    element("span", { class: "soft figure", text: now }), element("span", {}),
  );
}

function uploadRow(file, handlers) {
  const [id, name] = [data.words(file?.id), data.words(file?.filename)];
  if (!id) return null;
  const length = data.amount(file.keye?.duration);
  const size = data.amount(file.keye?.width) ? `${file.keye.width} × ${file.keye.height}` : "";
  const facts = [length === null ? "" : time(length, 0), size, bytes(data.amount(file.bytes) ?? 0)].filter(Boolean).join(" · ");
  const created = data.amount(file.created_at);
  return element(
    "li", {},
    element("span", {}, element("span", { class: "chip calm", text: t(file.keye?.kind === "image" ? "kind.image" : "kind.video") })),
    element("div", { class: "main" }, button(name || id, () => handlers.open({ place: "desk", file: id }), { class: "title" }),
      element("span", { class: "soft figure", text: facts })),
    element("span", { class: "soft figure", text: created === null ? "" : when(created * 1000) }), element("span", {}),
  );
}

/** The folders that are read; removing one deletes its indexes, not its videos. */
function folders() {
  if (!library?.folders.length) return [];
  const rows = library.folders.map((folder) => {
    const [name, path] = [data.words(folder?.name), data.words(folder?.path, 4000)];
    const remove = path && iconButton("close", t("library.folder.remove", { name }), async () => {
      try {
        await changeFolder(path, false);
      } catch (error) {
        toast(explain(error).join(" "));
      }
    }, { class: "quiet" });
    return element("li", {}, icon("folder"), element("span", { class: "cut-text", text: path || name, title: path || name }), element("span", { class: "space" }), remove || null);
  });
  return [element("h2", { text: t("library.folders") }), element("ul", { class: "rows" }, ...rows)];
}

/** `/` leaves for the field, X chooses the result that has the focus or the first, with Shift all up to it. */
export function libraryKeys() {
  return {
    field: () => document.getElementById("library-question")?.focus(),
    choose: (isRange) => {
      const card = document.activeElement?.closest(".grid li") ?? document.querySelector(".grid li");
      card?.querySelector("input").dispatchEvent(new MouseEvent("click", { bubbles: true, shiftKey: isRange }));
    },
  };
}
