// What every client of npm is tried with, and the report of a trial: the same as common.py.
import { readFileSync } from "node:fs";
import { deflateSync, crc32 } from "node:zlib";

export const URL_OF_KEYE = process.env.KEYE_URL ?? "http://127.0.0.1:8000";
export const API = `${URL_OF_KEYE}/v1`;
export const KEY = process.env.KEYE_KEY ?? "none-is-needed-here";
export const MODEL = "nano";
export const QUESTION = "when is the cyan triangle visible?";
export const VIDEO_FILE = new URL("../../src/keye/assets/demo.mp4", import.meta.url);
export const SCHEMA = {
  type: "object", properties: { answer: { type: "string", enum: ["yes", "no"] } },
  required: ["answer"], additionalProperties: false,
};
export const PARAMETERS = {
  type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"], additionalProperties: false,
};

function chunk(kind, data) {
  const body = Buffer.concat([Buffer.from(kind), data]);
  const whole = Buffer.alloc(8 + body.length);
  whole.writeUInt32BE(data.length, 0);
  body.copy(whole, 4);
  whole.writeUInt32BE(checksum(body), 4 + body.length);
  return whole;
}

function checksum(data) {
  if (crc32) return crc32(data);
  let value = ~0;
  for (const byte of data) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  }
  return ~value >>> 0;
}

/** A red picture. */
export function png(width = 112, height = 112) {
  const head = Buffer.alloc(13);
  head.writeUInt32BE(width, 0);
  head.writeUInt32BE(height, 4);
  head.set([8, 2, 0, 0, 0], 8);
  const row = Buffer.concat([Buffer.from([0]), Buffer.alloc(width * 3, Buffer.from([210, 40, 30]))]);
  const rows = Buffer.concat(Array(height).fill(row));
  const begin = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);
  return Buffer.concat([begin, chunk("IHDR", head), chunk("IDAT", deflateSync(rows)), chunk("IEND", Buffer.alloc(0))]);
}

export const imageUrl = () => `data:image/png;base64,${png().toString("base64")}`;
export const videoUrl = () => `data:video/mp4;base64,${readFileSync(VIDEO_FILE).toString("base64")}`;

export function check(condition, actual) {
  if (!condition) throw new Error(`not as expected: ${JSON.stringify(actual)}`);
}

export const checkAnswer = (value) => check(["yes", "no"].includes(value?.answer), value);
export const checkCity = (value) => check(["Paris", "Rome"].includes(value?.city), value);
export const checkInterval = (text) => check(/\d/.test(text ?? ""), text);

/** What `work` rejects with. */
export async function failure(work) {
  try {
    await work();
  } catch (error) {
    return error;
  }
  throw new Error("nothing was thrown");
}

/** Runs the cases, an object of functions by name, or those named on the command line. */
export async function report(cases) {
  const counts = { passed: 0, failed: 0 };
  for (const [name, work] of Object.entries(cases)) {
    if (process.argv.length > 2 && !process.argv.slice(2).includes(name)) continue;
    const begin = Date.now();
    const line = { case: name, outcome: "passed" };
    try {
      await work();
    } catch (error) {
      console.error(error);
      Object.assign(line, { outcome: "failed", error: String(error).slice(0, 2000) });
    }
    counts[line.outcome] += 1;
    console.log(JSON.stringify({ ...line, seconds: (Date.now() - begin) / 1000 }));
  }
  console.log(`${counts.passed} passed, ${counts.failed} failed`);
  process.exit(counts.failed ? 1 : 0);
}
