/**
 * What runs now: searches, questions and uploads, as the header and Activity list them. Fires `runs` on the document.
 *
 * A run is `{kind, title, share, left, stop, open}`; `share` (0 to 1) and `left` (seconds) are null where unknown.
 */

let running = [];

export function runs() {
  return running;
}

/** Lists a run and returns it; `change` it as it goes on and `end` it. */
export function begin(run) {
  const entry = { share: null, left: null, stop: null, open: null, ...run };
  running = [...running, entry];
  announce();
  return entry;
}

export function change(run, values) {
  Object.assign(run, values);
  announce();
}

export function end(run) {
  running = running.filter((other) => other !== run);
  announce();
}

function announce() {
  document.dispatchEvent(new Event("runs"));
}
