// What the providers of Vercel's AI SDK have in common: `model` makes one.
import { readFileSync } from "node:fs";
import { APICallError, Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import * as common from "./common.mjs";
const { check, checkAnswer, checkCity, failure } = common;

const asked = [];
const tools = {
  get_weather: tool({
    description: "the weather of a city",
    inputSchema: jsonSchema(common.PARAMETERS),
    execute: async ({ city }) => { asked.push(city); return "sunny"; },
  }),
};

export function cases(model, video) {
  const ask = (fields = {}) =>
    generateText({ model, prompt: "hello", maxOutputTokens: 24, temperature: 0, maxRetries: 0, ...fields });
  const about = (question, part) => [{ role: "user", content: [part, { type: "text", text: question }] }];
  const all = {
    async chat() {
      const { text, usage } = await ask();
      check(text && usage.inputTokens > 0, text);
    },
    async stream() {
      const { textStream } = streamText({ model, prompt: "hello", maxOutputTokens: 24, temperature: 0 });
      let text = "";
      for await (const piece of textStream) text += piece;
      check(text === (await ask()).text, text);
    },
    async image() {
      const part = { type: "file", mediaType: "image/png", data: common.png() };
      check((await ask({ prompt: undefined, messages: about("what colour is it?", part) })).text);
    },
    async tools() {
      const fields = { tools, toolChoice: "required", maxOutputTokens: 200 };
      checkCity((await ask(fields)).toolCalls[0].input);
      check(asked.length > 0, asked);
      check((await ask({ tools, maxOutputTokens: 100, stopWhen: stepCountIs(2) })).finishReason);
    },
    async structured() {
      const output = Output.object({ schema: jsonSchema(common.SCHEMA) });
      checkAnswer((await ask({ output, maxOutputTokens: 100 })).output);
    },
    async errors() {
      const error = await failure(() => ask({ temperature: 9 }));
      check(APICallError.isInstance(error) && error.statusCode === 400 && /temperature/.test(error.message), error);
    },
  };
  if (video) {
    all.video = async () => {
      const part = { type: "file", mediaType: "video/mp4", data: readFileSync(common.VIDEO_FILE) };
      common.checkInterval((await ask({ prompt: undefined, messages: about(common.QUESTION, part) })).text);
    };
  }
  return all;
}
