/** The tabs beside the stage. A tab without content is absent. Fires `tab` on the document when another one is chosen. */

import { byId, element } from "./dom.js";
import { t } from "./strings.js";

const TABS = ["answers", "subtitles", "scenes", "details"];

let chosen = "answers";
/** Counters and presence by tab: a number, "" for present without a counter, null for absent. */
const counts = { answers: "", subtitles: null, scenes: null, details: "" };

export function startPanel() {
  byId("tabs").addEventListener("keydown", (event) => {
    const present = TABS.filter((name) => counts[name] !== null);
    const at = present.indexOf(chosen);
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: present.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    chooseTab(present[(steps[event.key] + present.length) % present.length]);
    byId(`tab-${chosen}`).focus();
  });
  document.addEventListener("language", draw);
  draw();
}

export function chooseTab(name) {
  chosen = counts[name] === null ? "answers" : name;
  draw();
  document.dispatchEvent(new CustomEvent("tab", { detail: chosen }));
}

export function chosenTab() {
  return chosen;
}

/** The tab after the chosen one. */
export function nextTab() {
  const present = TABS.filter((name) => counts[name] !== null);
  chooseTab(present[(present.indexOf(chosen) + 1) % present.length]);
}

/** Sets the counter of a tab; "" for none, null where the tab has nothing to show. */
export function setTab(name, count) {
  if (counts[name] === count) return;
  counts[name] = count;
  if (counts[chosen] === null) chosen = "answers";
  draw();
}

function draw() {
  const hadFocus = byId("tabs").contains(document.activeElement);
  byId("tabs").replaceChildren(...TABS.filter((name) => counts[name] !== null).map((name) => {
    const isChosen = name === chosen;
    return element(
      "button",
      { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": String(isChosen), tabindex: isChosen ? 0 : -1,
        "aria-controls": `panel-${name}`, on: { click: () => chooseTab(name) } },
      element("span", { text: t(`tab.${name}`) }),
      counts[name] ? element("span", { class: "count", text: String(counts[name]) }) : null,
    );
  }));
  for (const name of TABS) {
    byId(`panel-${name}`).hidden = name !== chosen;
    byId(`panel-${name}`).setAttribute("aria-labelledby", `tab-${name}`);
  }
  byId("panel").setAttribute("aria-label", t(`tab.${chosen}`));
  if (hadFocus) byId(`tab-${chosen}`).focus();
}
