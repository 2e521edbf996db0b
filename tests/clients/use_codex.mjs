// @openai/codex, the coding agent, over responses, with keye as a provider of config.toml. What a model as small as
// keye-nano does with its tools is not the question: turns must end, and what is refused must be shown.
import { spawn } from "node:child_process";
import { mkdtempSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import * as common from "./common.mjs";
const { check } = common;

// Not below the folder for temporary files, which it refuses.
const folder = mkdtempSync(join(process.env.XDG_CACHE_HOME ?? homedir(), "keye-codex-"));
const home = join(folder, "home");
const work = join(folder, "work");
const program = fileURLToPath(new URL("node_modules/.bin/codex", import.meta.url));

function configure(model) {
  mkdirSync(home, { recursive: true });
  mkdirSync(work, { recursive: true });
  // Its own instructions and tools take 24,000 tokens of keye-nano's, whose context holds 16,384.
  writeFileSync(join(home, "instructions.md"), "You are a coding agent. Be brief.");
  writeFileSync(join(home, "config.toml"), `
model = "${model}"
model_provider = "keye"
model_context_window = 16384
model_instructions_file = "${join(home, "instructions.md")}"
[features]
goals = false
plugins = false
apps = false
[agents]
enabled = false
[skills]
include_instructions = false
[model_providers.keye]
name = "keye"
base_url = "${common.API}"
env_key = "KEYE_KEY"
wire_api = "responses"
[analytics]
enabled = false
`);
}

/** The events of one run. */
function run(...given) {
  const env = { ...process.env, CODEX_HOME: home, KEYE_KEY: common.KEY };
  const child = spawn(program, ["exec", "--skip-git-repo-check", "--json", ...given], { cwd: work, env });
  child.stdin.end();
  let output = "";
  child.stdout.on("data", (data) => (output += data));
  child.stderr.on("data", (data) => (output += data));
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", () => {
      const lines = output.split("\n").filter((line) => line.startsWith("{"));
      resolve({ output, events: lines.map((line) => JSON.parse(line)) });
    });
  });
}

const kinds = ({ events }) => events.map((event) => event.type);

process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
configure(common.MODEL);
await common.report({
  async chat() {
    const done = await run("hello");
    check(kinds(done).includes("turn.completed"), done.output.slice(-3000));
    check(done.events.find((event) => event.type === "turn.completed").usage.input_tokens > 1000, done.events);
  },
  async image() {
    writeFileSync(join(work, "red.png"), common.png());
    const done = await run("what colour is it?", "--image", join(work, "red.png"));
    check(kinds(done).includes("turn.completed"), done.output.slice(-3000));
  },
  async structured() {
    writeFileSync(join(work, "schema.json"), JSON.stringify(common.SCHEMA));
    const done = await run("hello", "--output-schema", join(work, "schema.json"));
    // The model may call a tool instead of answering, until its tokens end in the arguments of a call. Whatever it says
    // must follow the schema, and nothing but that limit may end the turn early.
    const said = done.events.filter((event) => event.item?.type === "agent_message");
    for (const event of said) common.checkAnswer(JSON.parse(event.item.text));
    const failures = done.events.filter((event) => event.type === "turn.failed").map((event) => event.error.message);
    check(said.length || failures.length, done.output.slice(-3000));
    check(failures.every((message) => /max_output_tokens/.test(message)), failures);
  },
  async errors() {
    const done = await run("word ".repeat(20000));
    check(kinds(done).includes("turn.failed") && /context/.test(done.output), done.output.slice(-3000));
  },
});
