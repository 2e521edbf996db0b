/** The keys of the desk. */

import { byId } from "./dom.js";
import { chooseTab, nextTab } from "./panel.js";

/** What keys do on the desk: functions by the names of `keys.js`. */
export function deskKeys(desk) {
  const { stage, sampling, composer, actions } = desk;
  if (!desk.isOpen) return { field: () => byId("choose").focus() };
  const { player, timeline } = stage;
  const [start, stop] = sampling.range;
  const tools = {
    field: () => composer.focus(), tab: nextTab, why: () => chooseTab("details"), times: () => actions.times(),
    link: () => actions.link(stage.turn, timeline.current),
  };
  if (stage.item?.kind !== "video") return tools;
  return {
    ...tools,
    toggle: () => player.toggle(), faster: () => player.faster(), sound: () => player.toggleSound(), full: () => player.fullscreen(),
    seconds: (by) => stage.jump(Math.max(0, player.time + by)), frames: (by) => stage.step(by),
    moment: (by) => desk.stepMoment(by), captions: () => byId("captions").click(),
    rank: (rank) => timeline.ofRank(rank) && stage.jump(timeline.ofRank(rank).start),
    range: (end_) => sampling.setRange(end_ ? start : player.time, end_ ? player.time : stop),
    clearRange: () => sampling.setRange(null, null), zoom: (factor) => timeline.zoom(factor), seeAll: () => timeline.seeAll(),
    seeMoment: () => timeline.seeMoment(), save: () => timeline.current && actions.save([timeline.current], byId("file-more")),
  };
}
