// The official OpenAI client for JavaScript.
import { createReadStream } from "node:fs";
import OpenAI from "openai";
import * as common from "./common.mjs";
const { MODEL, check, checkAnswer, checkCity, checkInterval, failure } = common;

const client = new OpenAI({ baseURL: common.API, apiKey: common.KEY, maxRetries: 0 });
const HELLO = [{ role: "user", content: "hello" }];
const TOOL = { type: "function", function: { name: "get_weather", parameters: common.PARAMETERS } };
const chat = (fields = {}) =>
  client.chat.completions.create({ model: MODEL, messages: HELLO, max_tokens: 24, temperature: 0, ...fields });

await common.report({
  async chat() {
    const answer = await chat();
    check(answer.choices[0].message.content && answer.usage.total_tokens > 0 && answer.system_fingerprint, answer);
  },
  async stream() {
    let text = "";
    for await (const chunk of await chat({ stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
    check(text === (await chat()).choices[0].message.content, text);
  },
  async image() {
    const content = [{ type: "image_url", image_url: { url: common.imageUrl() } }, { type: "text", text: "colour?" }];
    check((await chat({ messages: [{ role: "user", content }] })).choices[0].message.content);
  },
  async video() {
    const clip = { type: "video_url", video_url: { url: common.videoUrl() } };
    const content = [clip, { type: "text", text: common.QUESTION }];
    checkInterval((await chat({ messages: [{ role: "user", content }] })).choices[0].message.content);
  },
  async files() {
    const file = await client.files.create({ file: createReadStream(common.VIDEO_FILE), purpose: "user_data" });
    const content = [{ type: "file", file: { file_id: file.id } }, { type: "text", text: common.QUESTION }];
    checkInterval((await chat({ messages: [{ role: "user", content }] })).choices[0].message.content);
    check((await client.files.delete(file.id)).deleted);
  },
  async tools() {
    const fields = { tools: [TOOL], tool_choice: "required", max_tokens: 200 };
    const { message } = (await chat(fields)).choices[0];
    checkCity(JSON.parse(message.tool_calls[0].function.arguments));
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" };
    check((await chat({ messages: [...HELLO, message, result], tools: [TOOL] })).choices);
    const final = await client.chat.completions
      .stream({ model: MODEL, messages: HELLO, ...fields }).finalChatCompletion();
    checkCity(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments));
  },
  async structured() {
    const form = { type: "json_schema", json_schema: { name: "verdict", schema: common.SCHEMA, strict: true } };
    const fields = { model: MODEL, messages: HELLO, max_tokens: 200, response_format: form };
    checkAnswer((await client.chat.completions.parse(fields)).choices[0].message.parsed);
  },
  async responses() {
    const first = await client.responses.create({ model: MODEL, input: "hello", max_output_tokens: 24 });
    check(first.output_text === (await client.responses.retrieve(first.id)).output_text, first);
    const follows = { model: MODEL, input: "more", max_output_tokens: 24, previous_response_id: first.id };
    const kinds = [];
    for await (const event of await client.responses.create({ ...follows, stream: true })) kinds.push(event.type);
    check(kinds[0] === "response.created" && /completed|incomplete/.test(kinds.at(-1)), kinds);
    await client.responses.delete(first.id);
    check((await failure(() => client.responses.retrieve(first.id))) instanceof OpenAI.NotFoundError);
  },
  async errors() {
    const error = await failure(() => chat({ temperature: 9 }));
    check(error instanceof OpenAI.BadRequestError && error.param === "temperature", error);
  },
});
