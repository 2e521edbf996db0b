/**
 * What is sent to the server, made from what the user set. Pure functions: they touch neither page nor network.
 */

/** The text of a turn of the "find" mode when a later question goes on from it. */
const FIND_AS_QUESTION = "When does this happen in the video: ";

/** One medium as a part of a message; `sampling` is added to a video. Null settings are left out. */
export function mediaPart(medium, sampling) {
  if (medium.kind === "image") return { type: "image_url", image_url: { url: medium.id } };
  const settings = Object.fromEntries(Object.entries(sampling).filter(([, value]) => value !== null));
  return { type: "video_url", video_url: { url: medium.id, ...settings } };
}

/**
 * The body of `/v1/chat/completions`. The media stand in the first message, with the sampling of this question: a
 * conversation holds each medium once.
 */
export function chatRequest({ model, media, turns, question, sampling, options }) {
  const parts = media.map((medium) => mediaPart(medium, sampling));
  const messages = [];
  for (const turn of turns) {
    if (!turn.answer || turn.failed) continue;
    const text = turn.mode === "find" ? FIND_AS_QUESTION + turn.question : turn.question;
    messages.push({ role: "user", content: text }, { role: "assistant", content: turn.answer });
  }
  messages.push({ role: "user", content: question });
  if (parts.length) messages[0] = { role: "user", content: [...parts, { type: "text", text: messages[0].content }] };
  return {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    ...(options.temperature === null ? {} : { temperature: options.temperature }),
    ...(options.maxTokens === null ? {} : { max_tokens: options.maxTokens }),
    ...(options.thinking === "auto" ? {} : { chat_template_kwargs: { enable_thinking: options.thinking === "on" } }),
    keye: { evidence: options.evidence, progress: true },
  };
}

/** The body of `/v1/video/ground`. */
export function groundRequest({ model, video, event, sampling, options }) {
  return { model, video: mediaPart(video, sampling), event, stream: true, evidence: options.evidence };
}

/** The body of `/v1/video/find`. Settings that are left to the server are left out. */
export function findRequest({ model, video, event, sampling, options }) {
  const effort = options.effort && options.effort !== "auto" ? { effort: options.effort } : {};
  const { video_start, video_end } = sampling;
  const part = mediaPart(video, { video_start, video_end });
  const subtitles = options.subtitles === null ? {} : { subtitles: options.subtitles };
  return { model, video: part, event, stream: true, ...effort, ...subtitles };
}

/** The body of `/v1/media/plan`. */
export function planRequest({ model, media, sampling }) {
  return { model, content: media.map((medium) => mediaPart(medium, sampling)) };
}

/** A command line that sends the request. The key is named, never written. */
export function curl(address, request, withKey) {
  const lines = [
    `curl -N ${quote(address)}`,
    `-H 'Content-Type: application/json'`,
    ...(withKey ? [`-H "Authorization: Bearer $KEYE_API_KEY"`] : []),
    `-d ${quote(JSON.stringify(request))}`,
  ];
  return lines.join(" \\\n  ");
}

/** One word of a POSIX shell, whatever is in it. */
export function quote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
