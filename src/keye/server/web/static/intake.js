/** How files come onto the desk: chosen, dropped, pasted, or the sample. */

import { explain, sampleFile } from "./api.js";
import { kindOf, MAX_MEDIA } from "./media.js";
import { t } from "./strings.js";

/** Opens files of this machine: a video, pictures, or subtitles of what is open. */
export function addFiles(desk, files) {
  const lines = [...files].find((file) => /\.(srt|vtt)$/i.test(file.name));
  if (lines && desk.isOpen) return desk.subtitles.addFile(lines).catch((error) => desk.notice(explain(error).join(" ")));
  const usable = [...files].filter((file) => kindOf(file));
  if (!usable.length) return desk.notice(t("file.unknown"));
  const missing = desk.media.items.find((item) => item.error && !item.file);
  if (missing && kindOf(usable[0]) === missing.kind) {
    desk.media.attach(missing, usable[0]);
    return desk.open(missing);
  }
  const hasVideo = desk.media.video && usable.some((file) => kindOf(file) === "video");
  if (desk.hasTurns || hasVideo) desk.clear();
  let videos = 0;
  for (const file of usable.slice(0, MAX_MEDIA - desk.media.items.length)) {
    if (kindOf(file) === "video" && videos++) continue;
    desk.media.add(file);
  }
  desk.clearNotice();
  if (videos > 1) desk.notice(t("file.single"));
  desk.open(desk.media.video ?? desk.media.items[0]);
  desk.composer.open();
  return desk.composer.welcome();
}

/** Opens the sample clip, and asks an example about it if there is one. */
export async function useSample(desk, example) {
  try {
    addFiles(desk, [await sampleFile()]);
  } catch (error) {
    return desk.notice(explain(error).join(" "));
  }
  if (!example) return undefined;
  desk.composer.mode = example.mode;
  return desk.send({ question: example.text, mode: example.mode });
}
