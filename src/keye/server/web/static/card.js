/** A moment as it is shown: the first of an answer as a card, further ones as rows. Draws; what is wanted it says. */

import { button, element, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { attachMenu } from "./menu.js";
import { percent, range, seconds, spoken, t } from "./strings.js";

const STEPS = 5;
/** Least probability of each word, the most first. */
const WORDS = [[0.9, "very"], [0.7, "likely"], [0.5, "possible"], [0, "weak"]];

/** "very likely", or "" without a probability. */
export function sureness(probability) {
  if (probability === null) return "";
  const [, word] = WORDS.find(([least]) => Math.round(probability * 100) / 100 >= least);
  return t(`sure.${word}`);
}

/** Meter, percentage, word and length; without a probability only the length. */
export function sureLine({ probability, start, end }) {
  const line = element("div", { class: "sure" });
  if (probability !== null) {
    const full = Math.round(probability * STEPS);
    const bars = Array.from({ length: STEPS }, (_, i) => element("i", { class: i < full ? "full" : "" }));
    line.append(
      element("span", { class: "meter", "aria-hidden": "true" }, ...bars),
      element("b", { class: "figure", text: percent(probability) }), element("span", { text: sureness(probability) }),
    );
  }
  line.append(element("span", { class: "soft figure", text: seconds(end - start) }));
  return line;
}

/** Chips for what was checked and for ends that lie on a cut. */
export function chips({ checked, onCut }) {
  const found = [];
  if (checked === "twice") found.push(element("span", { class: "chip tint" }, icon("check"), t("checked.twice")));
  else if (checked) found.push(element("span", { class: "chip", text: t(`checked.${checked}`) }));
  if (onCut) found.push(element("span", { class: "chip calm", text: t(`cut.${onCut}`) }));
  return found;
}

export function quote({ subtitle }) {
  if (!subtitle) return null;
  return element("p", { class: "quote" }, t("quote", { text: subtitle.text }), " ",
    element("span", { class: "soft", text: t("quote.source") }));
}

/** A picture of the moment with its rank; `draw(canvas, seconds)` fills it. */
export function shot(moment, handlers) {
  const canvas = element("canvas", { width: 352, height: 212, "aria-hidden": "true" });
  handlers.picture(canvas, (moment.start + moment.end) / 2);
  const rank = element("span", { class: moment.checked === "no" ? "rank hollow" : "rank", text: String(moment.rank) });
  return element("button", {
    type: "button", class: "shot", "aria-label": t("moment.show", { range: spoken(moment) }),
    on: { click: () => handlers.jump(moment) },
  }, canvas, rank);
}

function times(moment, handlers) {
  return button(range(moment), () => handlers.jump(moment), {
    class: "range jump", "aria-label": t("moment.jump", { range: spoken(moment) }),
  });
}

function name({ label, name: video }) {
  const text = [label, video].filter(Boolean).join(" · ");
  return text ? element("span", { text }) : null;
}

/** The first moment of an answer, with everything that is done with one. */
export function card(moment, handlers) {
  const facts = element(
    "div", { class: "facts-of" }, times(moment, handlers), name(moment), sureLine(moment),
    element("div", { class: "row" }, ...chips(moment)), quote(moment),
  );
  const spokenTime = spoken(moment);
  const formats = iconButton("down", t("save.options"), () => {});
  attachMenu(formats, () => t("save.options"), () => handlers.formats(moment));
  const more = iconButton("more", t("more"), () => {});
  attachMenu(more, () => t("more"), () => handlers.more(moment));
  return element(
    "div", { class: "card" },
    element("div", { class: "card-top" }, shot(moment, handlers), facts),
    element(
      "div", { class: "card-actions" },
      playButton(moment, handlers),
      element("span", { class: "split" }, button(t("save"), (event) => handlers.save([moment], event.currentTarget), {
        icon: "save", "aria-label": t("save.name", { range: spokenTime }),
      }), formats),
      element("span", { class: "space" }),
      iconButton("link", t("link.copy"), () => handlers.link(moment)), more,
    ),
  );
}

function playButton(moment, handlers) {
  const name = t("play.name", { range: spoken(moment) });
  const node = button("", () => handlers.play(moment), { icon: "play", class: "primary", "aria-label": name });
  node.append(element("span", { class: "long", text: t("play") }), element("span", { class: "short", text: t("play.short") }));
  return node;
}

/** A further moment. */
export function momentRow(moment, handlers) {
  const facts = element(
    "div", { class: "facts-of" },
    times(moment, handlers), name(moment), sureLine(moment), element("div", { class: "row" }, ...chips(moment)),
    quote(moment),
  );
  const more = iconButton("more", t("more"), () => {}, { class: "quiet" });
  attachMenu(more, () => t("more"), () => [
    { text: t("save"), icon: "save", act: () => handlers.save([moment], more) },
    { text: t("link.copy"), icon: "link", act: () => handlers.link(moment) }, ...handlers.more(moment),
  ]);
  return element("div", { class: "row-of" }, shot(moment, handlers), facts, element("span", { class: "row" },
    iconButton("play", t("play.name", { range: spoken(moment) }), () => handlers.play(moment), { class: "quiet" }), more));
}
