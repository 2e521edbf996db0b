"""`keye batch`: the questions of a manifest, answered by engines or servers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError, missing_package

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.batch.manifest import BadLine, Item
    from keye.batch.workers import Worker
    from keye.media.processor import Decoder


@click.command(context_settings=options.CONTEXT)
@click.argument("manifest", type=options.PATH)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="OUT.jsonl",
              help="Where answers are appended; what it holds already is not asked again.")  # fmt: skip
@click.option("--server", "servers", metavar="URL[,URL...]", help="Ask these OpenAI-compatible servers instead.")
@options.asking
@click.option("--retry-errors", is_flag=True, help="Ask again the questions whose answers are errors.")
@click.option("--model", help="The model, or with --server what the servers call it.  [default: nano, the server's]")
@options.decode
@options.running_device
@options.adapter
@options.template
@options.storing
@options.attention
@options.sampling_frames
@options.sampling_text
@options.as_json
@options.debug
def batch(manifest: Path, output: Path, as_json: bool, retry_errors: bool, **arguments: Any) -> int:
    """Answer the questions of MANIFEST, a file of JSON lines or CSV, one question a line.

    Answers are appended to the output as they come, each once. A line that cannot be answered gets an error there;
    the others go on. After a kill the same command resumes. Settings of the command are defaults for lines
    without their own.

    \b
    {"video": "talk.mp4", "question": "who speaks?"}
    {"id": "b", "image": ["a.png", "b.png"], "question": "what differs?", "max_tokens": 50}
    \b
    keye batch questions.jsonl -o answers.jsonl
    keye batch questions.csv -o answers.jsonl --workers 2 --fps 1
    keye batch questions.jsonl -o answers.jsonl --server http://one:8000,http://two:8000
    """
    from keye.batch.journal import Journal
    from keye.batch.manifest import read_manifest
    from keye.batch.run import Batch, unknown_ids
    from keye.commands.shared import inputs, show

    check_workers(arguments)
    lines = read_manifest(manifest, defaults_of(arguments))
    if output.exists() and output.samefile(manifest):
        raise KeyeError(f"{output} is the manifest: choose another file with -o")
    with Journal(output) as journal:
        if others := unknown_ids(lines, journal):
            inputs.note(f"{output} holds {others:,} answers to questions that {manifest} does not have; they are kept")
        todo = pending(lines, journal.done, retry_errors)
        with inputs.open_decoder(arguments["decode"] if todo else None) as decoder:
            workers = open_workers(arguments, decoder) if todo else []
            with show.progress_bar("asking", notes=True) as advance:
                report = asyncio.run(Batch(workers, journal, progress=advance).run(lines, retry_errors=retry_errors))
    data = {**report.to_dict(), "workers": len(workers), "output": str(output)}
    if as_json:
        show.print_json(data)
    else:
        show.print_line(format_report(data))
    failures = sum(not journal.done[line.id].ok for line in lines)
    if failures:
        again = "correct their lines, or add --retry-errors, and run the same command again"
        verb = "has" if failures == 1 else "have"
        inputs.note(f"{failures:,} of {len(lines):,} items {verb} an error in {output}: {again}")
    return 2 if failures else 0


def pending(lines: Sequence[Item | BadLine], done: Mapping[str, Any], retry_errors: bool) -> list[Item]:
    """The questions for which workers are needed, as far as is known before the batch begins."""
    from keye.batch.manifest import Item

    return [
        line for line in lines if isinstance(line, Item)
        and not (line.id in done and (done[line.id].ok or (not retry_errors and done[line.id].digest == line.digest)))
    ]  # fmt: skip


def check_workers(arguments: Mapping[str, Any]) -> None:
    """`KeyeError` for options that exclude one another."""
    if arguments["servers"] and (arguments["workers"] or arguments["ray"]):
        raise KeyeError("--server asks servers, and --workers and --ray start engines: give one of them")
    if arguments["decode"] and (arguments["servers"] or arguments["workers"] or arguments["ray"]):
        raise KeyeError("--decode serves the engine of this process: leave it out with --server, --workers and --ray")
    if arguments.get("key") is not None and not arguments["servers"]:
        raise KeyeError("--key is for servers: give it with --server")
    if arguments["timeout"] is not None and not arguments["servers"]:
        raise KeyeError("--timeout is the time for an answer of a server: give it with --server")
    if arguments["servers"]:
        if arguments["adapter"] is not None:
            raise KeyeError("--adapter cannot be set with --server: name the adapter that the server has with --model")
        engines = ("mmproj", "dtype", "quant", "threads", *options.STORING_OPTIONS)
        if unused := [options.flag(name) for name in engines if arguments[name] is not None]:
            raise KeyeError(f"{', '.join(unused)} cannot be set with --server: the server has its own")
        if arguments["allow_private_urls"]:
            raise KeyeError("--allow-private-urls cannot be set with --server: the server opens addresses, or does not")


def defaults_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold for lines without their own, under the names that lines have them."""
    defaults = options.pick_set(arguments, (*options.VIDEO_OPTIONS, *options.SAMPLING_OPTIONS, "attention"))
    if "stop" in defaults:
        defaults["stop"] = list(defaults["stop"])
    if arguments["thinking"] is not None:
        defaults["think"] = arguments["thinking"]
    return defaults


def open_workers(
    arguments: Mapping[str, Any], decoder: Decoder | None, *, loaded: Keye | None = None, key: str | None = None
) -> list[Worker]:
    """The workers; engines in other processes are not started yet. The engine of this process has the model `loaded`,
    by default that of the arguments; servers get `key`, by default that of the environment."""
    from keye.commands.shared import inputs
    from keye.config.environment import api_key

    try:
        from keye.batch import workers as kinds
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "keye batch", "serve") from None
    slots, allow_private = arguments["concurrency"], arguments["allow_private_urls"]
    if arguments["servers"]:
        urls = list(dict.fromkeys(url.strip() for url in arguments["servers"].split(",") if url.strip()))
        seconds = arguments["timeout"] or kinds.ANSWER_SECONDS
        return [
            kinds.ServerWorker(
                url,
                model=arguments["model"],
                key=key or api_key(),
                slots=slots,
                tries=arguments["tries"],
                seconds=seconds,
            )
            for url in urls
        ]
    try:
        from keye.server.batch_engine import MODULE, engine_app, local_app
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "keye batch", "serve") from None
    named = {**arguments, "model": arguments["model"] or "nano"}
    if arguments["ray"] is None and arguments["workers"] is None:
        model = loaded or inputs.load_model(named, decoder=decoder)
        app = local_app(model, slots, allow_private=allow_private)
        return [kinds.EngineWorker(app, slots=slots)]
    settings = options.engine_settings(named)
    if arguments["ray"] is not None:
        from keye.batch.workers import ray_workers

        return ray_workers(
            arguments["ray"], engine_app, settings, count=arguments["workers"], slots=slots,
            allow_private=allow_private,
        )  # fmt: skip
    inputs.find_model(named["model"], named["mmproj"])
    return [
        kinds.ProcessWorker(
            ("-m", MODULE), {**settings, **share}, slots=slots, allow_private=allow_private,
            name=f"engine {number}",
        )
        for number, share in enumerate(inputs.shares(named, arguments["workers"]))
    ]  # fmt: skip


def format_report(data: Mapping[str, Any]) -> str:
    """The report as a sentence."""
    from keye.units import plural

    done = data["ok"] + data["errors"]
    if not done:
        return f"nothing was left to do: {data['output']} holds all {plural(data['items'], 'item')}"
    parts = [f"{plural(data['ok'], 'answer')} and {plural(data['errors'], 'error')} in {data['seconds']:,.1f} s"]
    parts.append(f"{data['items_per_second']:,.2f} a second from {plural(data['workers'], 'worker')}")
    if data["video_seconds"]:
        parts.append(f"{data['video_seconds'] / 3600:,.2f} h of video")
    parts.append(f"{data['prompt_tokens']:,} prompt tokens, {data['cached_tokens']:,} of them cached")
    parts.append(f"{data['completion_tokens']:,} generated")
    if data["skipped"]:
        parts.append(f"{data['skipped']:,} were answered before")
    if data["losses"]:
        parts.append(f"workers were lost {data['losses']:,} times")
    return f"{'; '.join(parts)}; all in {data['output']}"
