/**
 * Server-sent events of a response, one by one. It knows the wire format and nothing of what the events mean.
 */

/** Characters that one event may have; a server that sends more without an end is not waited for. */
const MAX_EVENT = 16 * 1024 * 1024;

/** The stream ended, or broke, before the server said `[DONE]`. */
export class StreamCut extends Error {}

/**
 * The data of every event as text, until `[DONE]`.
 *
 * Throws StreamCut if the stream ends without it or one event grows without end.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new StreamCut("cut");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        if (line || !data.length) continue;
        const event = data.join("\n");
        data = [];
        if (event === "[DONE]") return;
        yield event;
      }
      if (rest.length > MAX_EVENT) throw new StreamCut("endless");
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
