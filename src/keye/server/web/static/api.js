/**
 * Calls of the server's interface. It knows addresses, the key and errors; it draws nothing.
 *
 * The key lives in this tab's session storage only. Addresses are relative, so that the page works behind a prefix.
 */

import { events, StreamCut } from "./sse.js";
import { said, t } from "./strings.js";

const KEY = "keye.key";

/** An answer of the server that is an error: its sentence, the HTTP status, seconds to wait or null. */
export class ServerError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let askForKey = async () => false;

/** Sets what is called when the server wants a key; it resolves to whether the call should be tried again. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function storedKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

function authorization() {
  return storedKey() ? { Authorization: `Bearer ${storedKey()}` } : {};
}

/** The response to a call. Throws ServerError for an error of the server, TypeError where it cannot be reached. */
async function call(path, { method = "GET", json, signal } = {}) {
  for (;;) {
    const headers = { ...authorization(), ...(json === undefined ? {} : { "Content-Type": "application/json" }) };
    const body = json === undefined ? undefined : JSON.stringify(json);
    const response = await fetch(path, { method, headers, body, signal });
    if (response.ok) return response;
    if (response.status === 401 && (await askForKey(storedKey() !== ""))) continue;
    throw serverError(response.status, await response.text(), response.headers.get("Retry-After"));
  }
}

/** The error in the body of an answer, however it looks. */
export function serverError(status, body, retryAfter) {
  const reported = parse(body)?.error?.message;
  const seconds = Number(retryAfter);
  const wait = retryAfter !== null && Number.isFinite(seconds) && seconds >= 0 ? Math.ceil(seconds) : null;
  const message = typeof reported === "string" && reported !== "" ? reported : t("error.status", { status });
  return new ServerError(message, status, wait);
}

/** Whether there was no answer at all. */
export function isGone(error) {
  return !(error instanceof ServerError || error instanceof StreamCut);
}

/** What went wrong, and what the user can do about it, as two sentences. */
export function explain(error) {
  if (error instanceof StreamCut) return [t("error.cut"), t("error.cut.advice")];
  if (isGone(error)) return [t("gone.title"), t("gone.text")];
  const advice = {
    401: t("error.401"), 404: t("error.404"), 413: t("error.413"),
    429: error.retryAfter === null ? t("error.busy") : t("error.busy.seconds", { seconds: error.retryAfter }),
    503: t("error.busy"),
  };
  return [said(error.message), advice[error.status] ?? (error.status >= 500 ? t("error.500") : "")];
}

/** Whether the server answers at all. */
export async function isBack() {
  try {
    return (await fetch("health", { method: "GET" })).ok;
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return false;
  }
}

export async function models(signal) {
  const list = await (await call("v1/models", { signal })).json();
  return Array.isArray(list?.data) ? list.data : [];
}

/** Uploads and videos of the library by their ids, which tell them apart. */
function addressOf(id) {
  return `v1/${id.startsWith("library-") ? "library" : "files"}/${encodeURIComponent(id)}`;
}

export async function fileInfo(id) {
  const info = await (await call(addressOf(id))).json();
  // A video of the library is described in its own words.
  return info?.name ? { id, filename: info.name, bytes: info.size, keye: { kind: "video", duration: info.duration } } : info;
}

export async function fileContent(id) {
  return (await call(contentAddress(id))).blob();
}

export async function sampleFile() {
  return new File([await (await call("static/sample.mp4")).blob()], "sample.mp4", { type: "video/mp4" });
}

export async function plan(request, signal) {
  return (await call("v1/media/plan", { method: "POST", json: request, signal })).json();
}

export function contentAddress(id) {
  return `${addressOf(id)}/content`;
}

export async function files() {
  const list = await (await call("v1/files")).json();
  return Array.isArray(list?.data) ? list.data : [];
}

export async function deleteFile(id) {
  await call(`v1/files/${encodeURIComponent(id)}`, { method: "DELETE" });
}

export async function version() {
  return (await (await call("version")).json())?.version;
}

export async function clips(fileId, intervals) {
  return (await call("v1/clips", { method: "POST", json: { file_id: fileId, intervals } })).blob();
}

export function chat(request, signal) {
  return chunks("v1/chat/completions", request, signal);
}

export function ground(request, signal) {
  return chunks("v1/video/ground", request, signal);
}

export function find(request, signal) {
  return chunks("v1/video/find", request, signal);
}

/** Ends a search: its stream goes on to the result so far. */
export async function stopSearch(id) {
  await call(`v1/video/find/${encodeURIComponent(id)}/stop`, { method: "POST", json: {} });
}

/** All of the library, then its changes as they come. */
export function libraryEvents(signal) {
  return chunks("v1/library/events", undefined, signal);
}

export function findInLibrary(request, signal) {
  return chunks("v1/library/find", request, signal);
}

export async function changeFolder(path, isAdded) {
  const query = isAdded ? "" : `?${new URLSearchParams({ path })}`;
  await call(`v1/library/folders${query}`, isAdded ? { method: "POST", json: { path } } : { method: "DELETE" });
}

export function scenes(request, signal) {
  return chunks("v1/video/scenes", request, signal);
}

export async function subtitles(request, signal) {
  return (await call("v1/video/subtitles", { method: "POST", json: request, signal })).json();
}

/** Pictures of a video at most 60 times, as data URLs in the order of the times. */
export async function frames(request) {
  const list = await (await call("v1/video/frames", { method: "POST", json: request })).json();
  return Array.isArray(list?.data) ? list.data : [];
}

/** The record of a search that has ended, an HTML file. */
export async function searchRecord(id) {
  return (await call(`v1/video/find/${encodeURIComponent(id)}/record`)).blob();
}

/** A file of moments: its `blob` and `name`, and the sentences on what was rounded or left out. */
export async function exportMoments(request) {
  const response = await call("v1/video/export", { method: "POST", json: request });
  const name = /filename\*=UTF-8''([^;]+)/.exec(response.headers.get("Content-Disposition") ?? "")?.[1];
  const notes = parse(response.headers.get("Keye-Notes") ?? "[]");
  return { blob: await response.blob(), name: name && decodeURIComponent(name), notes: Array.isArray(notes) ? notes : [] };
}

/** What a JSON text holds; undefined where it is not one. */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return undefined;
  }
}

/** The chunks of a streamed answer as objects. An error inside the stream is thrown as ServerError. */
async function* chunks(path, request, signal) {
  const response = await call(path, request ? { method: "POST", json: request, signal } : { signal });
  for await (const event of events(response.body)) {
    const chunk = parse(event);
    if (chunk === undefined) throw new StreamCut("unreadable");
    // Inside a stream there are no status codes; the type distinguishes mistakes of the user from failures.
    if (chunk?.error) throw serverError(chunk.error.type === "invalid_request_error" ? 400 : 500, event, null);
    yield chunk;
  }
}

/**
 * Uploads a file; `onProgress` gets the bytes that are sent and all bytes. Resolves to the server's file object.
 *
 * XMLHttpRequest, because fetch does not report the progress of an upload.
 */
export async function upload(file, onProgress, signal) {
  for (;;) {
    const request = await send(file, onProgress, signal);
    if (request.status >= 200 && request.status < 300) return JSON.parse(request.responseText);
    if (request.status === 401 && (await askForKey(storedKey() !== ""))) continue;
    throw serverError(request.status, request.responseText, request.getResponseHeader("Retry-After"));
  }
}

function send(file, onProgress, signal) {
  const form = new FormData();
  form.append("purpose", "media");
  form.append("file", file, file.name);
  const request = new XMLHttpRequest();
  request.open("POST", "v1/files");
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  return new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded, event.total);
    request.onload = () => resolve(request);
    request.onerror = () => reject(new TypeError("failed"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
