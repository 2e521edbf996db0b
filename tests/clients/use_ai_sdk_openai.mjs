// Vercel's AI SDK with @ai-sdk/openai: each case over responses, its default, and over chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import { cases } from "./ai_sdk.mjs";
import { API, KEY, MODEL, report } from "./common.mjs";

const openai = createOpenAI({ baseURL: API, apiKey: KEY });
const responses = Object.entries(cases(openai(MODEL), false));
const chat = cases(openai.chat(MODEL), false);
const both = (name, work) => async () => { await work(); await chat[name](); };
await report(Object.fromEntries(responses.map(([name, work]) => [name, both(name, work)])));
