// Vercel's AI SDK with @ai-sdk/openai: responses, its default, and chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import { cases } from "./ai_sdk.mjs";
import { API, KEY, MODEL, report } from "./common.mjs";

const openai = createOpenAI({ baseURL: API, apiKey: KEY });
const chat = Object.entries(cases(openai.chat(MODEL), false));
await report({ ...cases(openai(MODEL), false), ...Object.fromEntries(chat.map(([name, work]) => [`${name} (chat)`, work])) });
