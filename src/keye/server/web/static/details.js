/** The tab for those who doubt: the frames that an answer rests on, what was looked at, the reply as it was written. */

import { howSearched } from "./answer.js";
import { button, byId, element } from "./dom.js";
import { serverNote } from "./notes.js";
import { evidenceOf } from "./stage.js";
import { number, percent, plural, seconds, t, time } from "./strings.js";

const MOST_SHOTS = 5;
const MOST_ROWS = 400;

/** Draws what is known of `turn`; `handlers`: `picture(canvas, seconds)`, `seek(seconds)`, `actions`. */
export function drawDetails(turn, item, model, handlers) {
  if (!turn?.isDone) return byId("why").replaceChildren();
  const frames = evidenceOf(turn, item);
  return byId("why").replaceChildren(
    ...rests(turn, frames, handlers),
    element("h2", { text: t("how.looked") }), facts(turn, model),
    ...(turn.coverage ? howSearched(turn).slice(0, 1) : []),
    element(
      "div", { class: "row" },
      ...(turn.searchId ? [button(t("record"), (event) => handlers.actions.record(turn, event.currentTarget), { icon: "save" })] : []),
      ...(turn.request ? [button(t("curl"), () => handlers.actions.curl(turn), { icon: "copy" })] : []),
    ),
    ...(turn.notes ?? []).map(serverNote),
    ...figures(frames),
  );
}

/** The frames that got the most attention, the most first; dashed where they lie outside every moment. */
function rests(turn, frames, handlers) {
  const head = element("div", { class: "row" }, element("h2", { text: t("why") }), element("span", { class: "space" }),
    element("span", { class: "soft", text: turn.question }));
  const reason = (turn.evidence ?? []).map((medium) => medium.reason).find(Boolean);
  if (!frames?.length) return reason ? [head, element("p", { class: "hint", text: reason })] : [head];
  const most = [...frames].sort((a, b) => b.share - a.share).slice(0, MOST_SHOTS);
  const isInside = ({ time: at }) => (turn.moments ?? []).some(({ start, end }) => at >= start - 0.01 && at <= end + 0.01);
  const isMarked = (frame) => turn.moments?.length > 0 && !isInside(frame);
  const shots = most.map((frame) => {
    const canvas = element("canvas", { width: 168, height: 168, "aria-hidden": "true" });
    if (handlers.hasPictures()) handlers.picture(canvas, frame.time);
    const lift = frame.lift === null ? "" : t("why.lift", { lift: number(frame.lift, 1) });
    return element(
      "button", { type: "button", class: isMarked(frame) ? "outside" : "", on: { click: () => handlers.seek(frame.time) } },
      canvas, element("span", { text: time(frame.time) }),
      element("small", { text: [percent(frame.share, frame.share < 0.1 ? 1 : 0), lift].filter(Boolean).join(", ") }),
    );
  });
  return [
    head, element("p", { class: "hint", text: t("why.text") }), element("div", { class: "shots" }, ...shots),
    ...(most.some(isMarked) ? [element("p", { class: "hint", text: t("why.outside") })] : []),
    ...(reason ? [element("p", { class: "hint", text: reason })] : []),
  ];
}

function facts(turn, model) {
  const list = element("dl", { class: "facts-list" });
  const add = (key, value) => value && list.append(element("dt", { text: t(key) }), element("dd", {}, value));
  const videos = (turn.plan ?? []).filter(({ kind }) => kind === "video");
  const frames = videos.reduce((sum, one) => sum + one.frames, 0);
  const size = videos[0]?.width && videos[0]?.height ? `, ${videos[0].width} × ${videos[0].height}` : "";
  add("facts.model", turn.request?.model ?? model?.id);
  if (turn.coverage?.frames) add("how.frames", plural("frames", turn.coverage.frames));
  else if (frames) add("how.frames", plural("frames", frames) + size);
  add("how.tokens", tokens(turn, model));
  if (turn.attention) add("facts.attention", turn.attention);
  if (turn.seconds) {
    const parts = (turn.durations ?? []).map(([name, value]) => t("facts.part", { name, value: seconds(value) }));
    add("facts.time", [seconds(turn.seconds), parts.join(", ")].filter(Boolean).join(": "));
  }
  if (turn.presence !== null && turn.presence !== undefined) add("facts.presence", percent(turn.presence, 1));
  if (turn.answer) add("facts.reply", element("code", { text: turn.answer }));
  return list;
}

function tokens({ usage, coverage }, model) {
  if (coverage?.queryTokens) return number(coverage.queryTokens);
  if (!usage?.prompt) return "";
  const values = { prompt: number(usage.prompt), generated: number(usage.generated ?? 0), context: number(model?.context ?? 0) };
  return t(model?.context ? "facts.tokens.of" : "facts.tokens", values);
}

/** What the lane of the evidence draws, as a table. */
function figures(frames) {
  if (!frames?.length) return [];
  const cells = (kind, ...texts) => element("tr", {}, ...texts.map((text) => element(kind, { text, scope: kind === "th" ? "col" : null })));
  const rows = frames.slice(0, MOST_ROWS).map(({ time: at, share, lift }) => (
    cells("td", time(at), percent(share, 2), lift === null ? "" : number(lift, 1))
  ));
  const head = element("thead", {}, cells("th", t("figures.time"), t("figures.share"), t("figures.lift")));
  const table = element("table", {}, head, element("tbody", {}, ...rows));
  return [element("details", {}, element("summary", { text: t("figures") }), table)];
}
