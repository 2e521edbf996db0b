/** What the person chose, kept in this browser. A change fires `setting` on the document with its name as detail. */

const PLACE = "keye.settings";
const DEFAULTS = {
  language: "auto", theme: "auto", singleKeys: true, playFound: false, threshold: null, effort: "auto", subtitles: true,
  format: "fcp7", rate: "auto", handles: 1, sequence: "sequence", sound: true,
  temperature: null, maxTokens: null, thinking: "auto", evidence: true,
  videoMode: "find", otherMode: "ask",
};

let values = { ...DEFAULTS, ...read() };

export function setting(name) {
  return values[name];
}

export function set(name, value) {
  values[name] = value;
  try {
    localStorage.setItem(PLACE, JSON.stringify(values));
  } catch (error) {
    // A private window without storage: the choice lasts as long as the page.
    if (!(error instanceof DOMException)) throw error;
  }
  document.dispatchEvent(new CustomEvent("setting", { detail: name }));
}

/** Settings of a question. */
export function options() {
  const { temperature, maxTokens, thinking, evidence } = values;
  return { temperature, maxTokens, thinking, evidence };
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    const known = (entry) => entry[0] in DEFAULTS && (typeof entry[1] === typeof DEFAULTS[entry[0]] || entry[1] === null
      || DEFAULTS[entry[0]] === null);
    return Object.fromEntries(Object.entries(kept ?? {}).filter(known));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return {};
  }
}
