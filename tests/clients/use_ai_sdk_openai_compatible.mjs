// Vercel's AI SDK with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { cases } from "./ai_sdk.mjs";
import { API, KEY, MODEL, report } from "./common.mjs";

const settings = { name: "keye", baseURL: API, apiKey: KEY, supportsStructuredOutputs: true };
await report(cases(createOpenAICompatible(settings)(MODEL), true));
