/** The dialog that writes moments for editing programs, for reading, or as clips. */

import { clips, explain, exportMoments } from "./api.js";
import { byId, button, download, element } from "./dom.js";
import { icon } from "./icons.js";
import { noteBox } from "./notes.js";
import { toast } from "./notices.js";
import { set, setting } from "./store.js";
import { number, plural, t } from "./strings.js";

/** Formats by what they are for: the server's name and the file's suffix. */
const FORMATS = {
  editor: [["fcp7", ".xml"], ["fcpxml", ".fcpxml"], ["edl", ".edl"], ["otio", ".otio"]],
  reading: [["csv", ".csv"], ["srt", ".srt"], ["vtt", ".vtt"], ["json", ".json"]],
  video: [["clips", ".mp4"]],
};
export const FORMAT_NAMES = Object.values(FORMATS).flat().map(([name]) => name);
export const RATES = ["23.976", "24", "25", "29.97df", "29.97ndf", "30", "50", "59.94df", "60"];

let subject = null;

/** Opens the dialog for `moments`; `videos` by the `file` of moments, or one under "" where they name none. */
export function openExport(moments, videos, title) {
  subject = { moments, videos, title: title || t("lane.moments") };
  draw();
  byId("export").showModal();
}

function draw() {
  const { moments } = subject;
  const form = element("form", { class: "export" }, head(moments), ...choices(), fields(), note(), foot());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    save(form);
  });
  byId("export").replaceChildren(form);
}

function head(moments) {
  return element("div", { class: "row" }, element("h2", { id: "export-title", text: plural("export", moments.length) }),
    element("span", { class: "space" }),
    button("", () => byId("export").close(), { icon: "close", class: "quiet icon-button", "aria-label": t("close"), title: t("close") }));
}

function choices() {
  return Object.entries(FORMATS).map(([group, formats]) => element(
    "fieldset", { class: "formats" }, element("legend", { class: "hint", text: t(`export.for.${group}`) }),
    ...formats.map(([name, suffix]) => element(
      "label", {},
      element("input", {
        type: "radio", name: "format", value: name, checked: name === setting("format"),
        on: { change: () => {
          set("format", name);
          draw();
          byId("export").querySelector("input:checked").focus();
        } },
      }),
      element("span", { text: t(`format.${name}`) }), element("span", { class: "space" }), element("span", { class: "soft", text: suffix }),
    )),
  ));
}

/** What editing programs need to know; clips only take seconds before and after. */
function fields() {
  const format = setting("format");
  const isEditor = FORMATS.editor.some(([name]) => name === format);
  const box = element("div", { class: "export-fields" });
  const add = (name, control) => box.append(element("label", {}, element("span", { text: t(`export.${name}`) }), control));
  if (isEditor) {
    add("rate", rateField("export-rate"));
    add("timecode", element("input", { id: "export-timecode", type: "text", maxlength: 20, placeholder: t("export.timecode.auto"), autocomplete: "off" }));
  }
  if (isEditor || format === "clips") {
    add("handles", element("input", { id: "export-handles", type: "number", min: 0, max: 3600, step: "any", value: setting("handles") }));
  }
  if (isEditor) add("mode", modeField("export-mode"));
  return box;
}

export function rateField(id) {
  const names = [["auto", t("export.rate.auto")], ...RATES.map((rate) => [rate, rate.replace("ndf", " NDF").replace("df", " DF")])];
  return pick(id, "rate", names);
}

export function modeField(id) {
  return pick(id, "sequence", [["sequence", t("export.mode.sequence")], ["markers", t("export.mode.markers")]]);
}

function pick(id, name, choices) {
  const options = choices.map(([value, text]) => element("option", { value, text, selected: value === setting(name) }));
  return element("select", { id, on: { change: (event) => {
    set(name, event.target.value);
    if (id.startsWith("export-")) redrawNote();
  } } }, ...options);
}

/** Half a frame is the most by which a time can be off; the rate is the chosen one, or the file's where it is known. */
function note() {
  const rate = setting("rate") === "auto" ? Math.min(...Object.values(subject.videos).map(({ fps }) => fps ?? NaN)) : parseFloat(setting("rate"));
  const isEditor = FORMATS.editor.some(([name]) => name === setting("format"));
  const box = element("div", { id: "export-note" });
  if (isEditor && rate > 0) box.append(noteBox("", "", t("export.round", { ms: number(Math.ceil(500 / rate)) })));
  return box;
}

function redrawNote() {
  document.getElementById("export-note").replaceWith(note());
}

function foot() {
  const [, suffix] = Object.values(FORMATS).flat().find(([name]) => name === setting("format")) ?? ["", ""];
  const several = setting("format") === "clips" && subject.moments.length > 1;
  return element("button", { type: "submit", class: "primary" }, icon("save"),
    element("span", { text: t("export.save", { name: `${stem(subject.title)}${several ? ".zip" : suffix}` }) }));
}

/** A title as the beginning of a file's name. */
export function stem(title, fallback = "moments") {
  return title.replaceAll(/[^\p{L}\p{N}_-]+/gu, "-").replaceAll(/^-|-$/g, "").slice(0, 60) || fallback;
}

function value(id) {
  return document.getElementById(id)?.value ?? "";
}

async function save(form) {
  const send = form.querySelector("[type=submit]");
  send.disabled = true;
  try {
    const handles = Math.max(0, Number(value("export-handles")) || 0);
    if (value("export-handles") !== "") set("handles", handles);
    const notes = setting("format") === "clips" ? await saveClips(handles) : await saveFile(handles);
    byId("export").close();
    toast([t("export.saved"), ...notes.filter((text) => typeof text === "string")].join(" "));
  } catch (error) {
    document.getElementById("export-note").replaceChildren(noteBox("wrong", "", explain(error).join(" ")));
  } finally {
    send.disabled = false;
  }
}

/** A file of clips from each video. */
async function saveClips(handles) {
  const name = (moment) => moment.file ?? "";
  for (const [file, video] of Object.entries(subject.videos)) {
    const own = subject.moments.filter((moment) => name(moment) === file);
    if (!own.length) continue;
    const pairs = own.map(({ start, end }) => [Math.max(0, start - handles), end + handles]);
    download(await clips(video.id, pairs), `${stem(subject.title)}${own.length > 1 ? ".zip" : ".mp4"}`);
  }
  return [];
}

async function saveFile(handles) {
  const { moments, videos, title } = subject;
  const names = Object.keys(videos);
  const part = (video) => ({ file_id: video.id });
  const single = names.length === 1 && names[0] === "";
  const isEditor = FORMATS.editor.some(([name]) => name === setting("format"));
  const editor = {
    ...(setting("rate") === "auto" ? {} : { rate: setting("rate") }),
    ...(value("export-timecode").trim() ? { start_timecode: value("export-timecode").trim() } : {}),
    handles: [handles, handles], mode: setting("sequence"),
  };
  const { blob, name, notes } = await exportMoments({
    ...(single ? { video: part(videos[""]) } : { videos: Object.fromEntries(names.map((file) => [file, part(videos[file])])) }),
    moments: moments.map(({ start, end, probability, label, file }) => ({
      start, end, ...(probability === null ? {} : { probability }), label: label ?? "", ...(single ? {} : { file }),
    })),
    format: setting("format"), title, label: title, ...(isEditor ? editor : {}),
  });
  download(blob, name || stem(title));
  return notes;
}
