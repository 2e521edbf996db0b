/** Settings: what belongs to the person and to the server. A change applies at once; nothing waits for a Save button. */

import { deleteFile, explain, files, storedKey, storeKey, version } from "./api.js";
import { byId, button, element } from "./dom.js";
import { FORMAT_NAMES, modeField, rateField } from "./export.js";
import { conversations, forgetAll } from "./history.js";
import { askForKey } from "./keydialog.js";
import { isAble, model } from "./model.js";
import { toast } from "./notices.js";
import { set, setting } from "./store.js";
import { bytes, language, percent, plural, said, t } from "./strings.js";

const GROUPS = ["you", "finding", "export", "advanced", "server", "privacy"];
let facts = { version: null, files: null };

export function startSettings() {
  const draw = () => byId("settings").hidden || byId("settings").replaceChildren(...settings());
  for (const type of ["language", "model", "conversations", "facts"]) document.addEventListener(type, draw);
  document.addEventListener("place", (event) => {
    if (event.detail.place !== "settings") return;
    draw();
    document.getElementById(`group-${event.detail.item}`)?.scrollIntoView();
    learn();
  });
}

/** Asks the server for what this place shows of it. */
async function learn() {
  try {
    const [name, list] = await Promise.all([version(), files()]);
    facts = { version: typeof name === "string" ? name.slice(0, 40) : null, files: list };
  } catch (error) {
    toast(explain(error).join(" "));
  }
  document.dispatchEvent(new Event("facts"));
}

function settings() {
  const contents = { you: you(), finding: finding(), export: exporting(), advanced: advanced(), server: server(), privacy: privacy() };
  const present = GROUPS.filter((name) => contents[name].length);
  const links = present.map((name, i) => element("a", { href: `#/settings/${name}`, text: t(`group.${name}`), "aria-current": i ? null : "true" }));
  const groups = present.map((name) => element(
    "section", { class: "group", id: `group-${name}`, "aria-labelledby": `title-${name}` },
    element("h2", { id: `title-${name}`, text: t(`group.${name}`) }),
    name === "advanced" ? element("p", { class: "soft", text: t("group.advanced.text") }) : null,
    element("div", {}, ...contents[name]),
  ));
  return [element("nav", { "aria-label": t("place.settings") }, element("h1", { text: t("place.settings") }), ...links),
    element("div", { class: "groups" }, ...groups)];
}

function option(key, control, { hint = true, id = null } = {}) {
  const name = element(id ? "label" : "b", id ? { for: id } : { id: `name-${key}` }, id ? element("b", { text: t(`set.${key}`) }) : t(`set.${key}`));
  return element("div", { class: "option" },
    element("div", {}, name, hint ? element("span", { class: "hint", text: t(`set.${key}.hint`) }) : null), control);
}

function segments(name, choices, value) {
  const radios = choices.map(([choice, text, lang]) => element("label", { lang: lang ?? null },
    element("input", { type: "radio", name: `set-${name}`, value: choice, checked: choice === value, on: { change: () => set(name, choice) } }),
    element("span", { text })));
  return element("div", { class: "segments", role: "radiogroup", "aria-labelledby": `name-${name}` }, ...radios);
}

function toggle(name) {
  const node = button("", () => {
    set(name, !setting(name));
    node.setAttribute("aria-checked", String(setting(name)));
  }, { class: "switch", role: "switch", "aria-checked": String(setting(name)), "aria-labelledby": `name-${name}` });
  return node;
}

function choice(name, choices) {
  const read = (text) => (text === "" ? null : Number.isFinite(Number(text)) ? Number(text) : text);
  const options = choices.map(([value, text]) => element("option", { value: value ?? "", text, selected: value === setting(name) }));
  return element("select", { id: `set-${name}`, on: { change: (event) => set(name, read(event.target.value)) } }, ...options);
}

function amountField(name, { max, step, placeholder }) {
  const field = element("input", { id: `set-${name}`, type: "number", min: 0, max, step, placeholder, value: setting(name) });
  field.addEventListener("change", () => {
    const value = field.value === "" ? null : Number(field.value);
    if (field.checkValidity()) set(name, value);
    if (field.checkValidity()) field.removeAttribute("aria-invalid");
    else field.setAttribute("aria-invalid", "true");
  });
  return field;
}

function you() {
  return [
    option("language", segments("language", [["en", "English", "en"], ["zh", "简体中文", "zh-CN"]], language())),
    option("theme", segments("theme", ["auto", "light", "dark"].map((name) => [name, t(`theme.${name}`)]), setting("theme")), { hint: false }),
    option("singleKeys", toggle("singleKeys")), option("playFound", toggle("playFound")),
  ];
}

function finding() {
  if (!isAble("find")) return [];
  const levels = [[null, t("set.threshold.auto")], ...[0.3, 0.5, 0.7, 0.9].map((value) => [value, percent(value)])];
  const efforts = ["auto", "low", "medium", "high"].map((name) => [name, t(`effort.${name}`)]);
  return [
    option("threshold", choice("threshold", levels), { id: "set-threshold" }),
    option("effort", choice("effort", efforts), { id: "set-effort" }),
    option("subtitles", toggle("subtitles"), { hint: false }),
  ];
}

function exporting() {
  if (!isAble("export")) return [];
  const handles = amountField("handles", { max: 3600, step: "any", placeholder: "0" });
  return [
    option("format", choice("format", FORMAT_NAMES.map((name) => [name, t(`format.${name}`)])), { hint: false, id: "set-format" }),
    option("rate", rateField("set-rate"), { hint: false, id: "set-rate" }),
    option("handles", handles, { hint: false, id: "set-handles" }),
    option("sequence", modeField("set-sequence"), { hint: false, id: "set-sequence" }),
  ];
}

function advanced() {
  const server = t("set.server");
  return [
    option("temperature", amountField("temperature", { max: 2, step: "any", placeholder: server }), { hint: false, id: "set-temperature" }),
    option("maxTokens", amountField("maxTokens", { max: 1_000_000, step: 1, placeholder: server }), { hint: false, id: "set-maxTokens" }),
    option("thinking", choice("thinking", ["auto", "on", "off"].map((name) => [name, t(`thinking.${name}`)])), { hint: false, id: "set-thinking" }),
    option("evidence", toggle("evidence")),
  ];
}

function server() {
  const loaded = model();
  const chip = loaded?.short ? element("span", { class: "chip warn", text: said(loaded.short) }) : null;
  const key = button(t(storedKey() ? "key.change" : "key.enter.button"), async () => {
    if (await askForKey()) document.dispatchEvent(new Event("key"));
    document.dispatchEvent(new Event("facts"));
  });
  const forgetKey = storedKey() ? button(t("key.forget"), () => {
    storeKey("");
    document.dispatchEvent(new Event("facts"));
  }, { class: "quiet" }) : null;
  return [
    ...(loaded ? [option("model", element("span", { class: "row" }, loaded.id, chip))] : []),
    option("connection", element("span", { class: "chip tint", text: location.host }), { hint: false }),
    option("key", element("span", { class: "row" }, forgetKey, key)),
    ...(facts.version ? [option("version", element("span", { text: `keye ${facts.version}` }), { hint: false })] : []),
  ];
}

function privacy() {
  const remove = button(t("privacy.delete"), () => forgetAll(), { id: "history-clear" });
  remove.disabled = !conversations().length;
  const size = (facts.files ?? []).reduce((sum, file) => sum + (Number(file?.bytes) || 0), 0);
  const held = facts.files && element("div", { class: "option" },
    element("div", {}, element("b", { text: t("set.files") }),
      element("span", { class: "hint", text: `${plural("files", facts.files.length)}, ${bytes(size)}` })),
    button(t("files.see"), showFiles));
  return [option("history", remove), ...(held ? [held] : [])];
}

/** The files on the server, each with a way to delete it. */
function showFiles() {
  const draw = () => byId("files-list").replaceChildren(...(facts.files ?? []).map((file) => element(
    "li", {}, element("span", { class: "cut-text", text: String(file?.filename), title: String(file?.filename) }), element("span", { class: "space" }),
    element("span", { class: "soft", text: bytes(Number(file?.bytes) || 0) }),
    button(t("delete"), async (event) => {
      event.currentTarget.disabled = true;
      try {
        await deleteFile(String(file?.id));
        await learn();
      } catch (error) {
        toast(explain(error).join(" "));
      }
      draw();
    }, { "aria-label": t("files.delete", { name: String(file?.filename) }) }),
  )));
  draw();
  byId("files").showModal();
}
