"""`keye eval TASK...`: asks a model the questions of benchmarks and scores it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from keye.commands import batch
from keye.commands.shared import options
from keye.errors import KeyeError, missing_package

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.batch.workers import Worker
    from keye.evals.judge import Judge
    from keye.evals.run import ModelFacts
    from keye.evals.settings import RunSettings
    from keye.media.processor import Decoder

_MEDIA: Final = (
    "fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "video_total_pixels",
)  # fmt: skip
_SAMPLING: Final = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_ENGINE: Final = ("mmproj", "dtype", "quant", "adapter", *options.FORMAT_OPTIONS)
_JUDGE_SLOTS: Final = 8
REPORT_NAME: Final = "report.html"

prompting = options.combine(
    click.option("--subtitles", is_flag=True, help="Put subtitles into the prompt, where the task has them."),
    click.option("--reasoning", is_flag=True, help="Use the task's prompt that asks for reasoning, where it has one."),
)
sampling = options.combine(
    click.option("--fps", type=options.Positive(), help="Frames sampled per second of video."),
    click.option("--frames", "nframes", type=options.COUNT, metavar="N", help="Number of frames, instead of --fps."),
    click.option("--min-frames", type=options.COUNT, metavar="N", help="At least this many frames."),
    click.option("--max-frames", type=options.COUNT, metavar="N", help="At most this many frames."),
    click.option("--min-pixels", type=options.COUNT, metavar="N", help="Fewest pixels of a frame or image."),
    click.option("--max-pixels", type=options.COUNT, metavar="N", help="Most pixels of a frame or image."),
    click.option("--total-pixels", "video_total_pixels", type=options.COUNT, metavar="N",
                 help="Most pixels of all frames."),
    click.option("--max-tokens", type=options.COUNT, metavar="N", help="Longest reply.  [default: the task's]"),
    click.option("--temperature", type=float, help="Of sampling.  [default: 0]"),
    click.option("--top-p", type=float, help="Sample from the likeliest tokens of this probability together."),
    click.option("--top-k", type=int, help="Sample from this many likeliest tokens."),
    click.option("--repetition-penalty", type=float, help="Above 1: tokens of the reply become less likely."),
    click.option("--seed", type=int, help="Seed of sampling."),
    click.option("--thinking/--no-thinking", default=None, help="Ask for or against reasoning before the answer."),
)  # fmt: skip


@click.command(context_settings=options.CONTEXT)
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR",
              help="Folder of results; what it holds already is not asked again.")  # fmt: skip
@click.option("--data", type=options.PATH, metavar="DIR",
              help="Folder of the data, or of one folder for each task.  [default: KEYE_EVAL_DATA, ~/.local/share/keye/"
                   "evals]")  # fmt: skip
@click.option("--limit", type=options.COUNT, metavar="N", help="Only the first N items of each task.")
@click.option("--allow-missing", is_flag=True, help="Run although media are missing; their items count as failed.")
@click.option("--model", help="The model, or with --server what the servers call it.  [default: nano, the server's]")
@click.option("--server", "servers", metavar="URL[,URL...]", help="Ask these OpenAI-compatible servers instead.")
@click.option("--key", metavar="ENV", help="Environment variable that holds the servers' key.  [default: KEYE_API_KEY]")
@prompting
@sampling
@options.attention
@click.option("--through", type=click.Choice(["find"]),
              help="Search the videos of grounding tasks as keye find does, instead of one prompt.")  # fmt: skip
@click.option("--judge", metavar="URL", help="Server that judges replies in which the strict scorer reads no answer.")
@click.option("--judge-model", metavar="NAME", help="What the judge's server calls its model.  [default: its first]")
@click.option("--judge-key", metavar="ENV", help="Environment variable that holds the judge's key.")
@click.option("--format", "form", type=click.Choice(["lmms-eval", "vlmevalkit"]), multiple=True,
              help="Also write the predictions in this form; may be repeated.")  # fmt: skip
@options.asking
@options.decode
@options.running_device
@options.adapter
@options.template
@options.storing
@options.as_json
@options.debug
def run(tasks: tuple[str, ...], output: Path, data: Path | None, form: tuple[str, ...], as_json: bool,
        **arguments: Any) -> int:  # fmt: skip
    """Ask a model the questions of tasks, and score its replies by the strict scorer and by official ones.

    Each reply is written as it comes. After a kill, or where items failed, the same command goes on with what is left.
    Failed items count as wrong, and a score of which more than 5 % failed is not given. A task is a name of keye eval
    list, a family of them (timelens), or FILE.py:NAME.

    \b
    keye eval timelens_charades --data ~/data -o results
    keye eval videomme --server http://one:8000 --key MY_KEY --frames 64 -o results
    """
    from keye.commands.eval.show import print_results
    from keye.commands.shared import inputs, show
    from keye.config.environment import eval_folder
    from keye.evals.results.page import build_report
    from keye.evals.settings import data_folder
    from keye.evals.task import find_tasks

    try:
        from keye.evals.run import RunOptions, export_predictions, read_items, run_task
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "keye eval", "eval") from None
    arguments = {**arguments, "allow_private_urls": False}
    batch.check_workers(arguments)
    chosen = {task.name: task for name in tasks for task in find_tasks(name)}
    if arguments["through"]:
        from keye.evals.search import as_search

        chosen = {name: as_search(task) for name, task in chosen.items()}
    settings = settings_of(arguments)
    folders = {name: data_folder(task, data or eval_folder()) for name, task in chosen.items()}
    for name, task in chosen.items() if len(chosen) > 1 else ():  # before the first of them runs for hours
        read_items(task, folders[name], settings, allow_missing=arguments["allow_missing"])
    results = []
    with inputs.open_decoder(arguments["decode"]) as decoder:
        workers = TaskWorkers(arguments, decoder)
        model, judge = workers.facts(), _judge(arguments)
        for key, task in chosen.items():
            with show.progress_bar(task.name, notes=True) as advance:
                work = RunOptions(workers, model, arguments["allow_missing"], judge, advance)
                results.append(run_task(task, folders[key], settings, output, work))
            for name in form:
                export_predictions(output / task.name, name)
    build_report(results, output / REPORT_NAME)
    if as_json:
        show.print_json({"results": results, "output": str(output)})
    else:
        print_results(results)
    return _note_incomplete(results, output)


def settings_of(arguments: Mapping[str, Any]) -> RunSettings:
    from keye.evals.settings import RunSettings

    prompt = {name: True for name in ("subtitles", "reasoning") if arguments[name]}
    return RunSettings(
        limit=arguments["limit"], media=options.pick_set(arguments, _MEDIA),
        sampling=options.pick_set(arguments, _SAMPLING), thinking=arguments["thinking"],
        attention=arguments["attention"], prompt=prompt,
    )  # fmt: skip


def _note_incomplete(results: Sequence[Mapping[str, Any]], output: Path) -> int:
    """Says what failed and what is missing, and returns the exit code."""
    from keye.commands.shared import inputs

    for result in results:
        for error in result["errors"]:
            inputs.note(f"{result['task']}: {error['count']:,} items: {error['message']} (such as {error['item']})")
        if result["stopped"]:
            inputs.note(f"{result['task']} stopped: {result['stopped']}")
        if result.get("judge_error"):
            inputs.note(f"{result['task']}: the judge was not asked: {result['judge_error']}")
    incomplete = [result["task"] for result in results if not result["complete"]]
    if incomplete:
        names = ", ".join(incomplete)
        inputs.note(f"not complete: {names}; the same command asks only what failed or is missing in {output}")
    return 2 if incomplete else 0


class TaskWorkers:
    """Makes the workers of each task; a model of this process is loaded once, when it is first needed."""

    def __init__(self, arguments: Mapping[str, Any], decoder: Decoder | None) -> None:
        self._arguments, self._decoder = arguments, decoder
        self._model: Keye | None = None
        self._key = _key(arguments["key"])

    def __call__(self) -> list[Worker]:
        if self._arguments.get("through"):
            from keye.evals.search import FindWorker

            return [FindWorker(self._load_here)]
        return batch.open_workers(self._arguments, self._decoder, loaded=self._load(), key=self._key)

    def _load_here(self) -> Keye:
        model = self._load()
        if model is None:
            raise KeyeError(
                "--through find searches with a model in this process: leave --server, --workers and --ray out"
            )
        return model

    def _load(self) -> Keye | None:
        from keye.commands.shared import inputs

        arguments = self._arguments
        if arguments["servers"] or arguments["workers"] or arguments["ray"]:
            return None
        if self._model is None:
            named = {**arguments, "model": arguments["model"] or "nano"}
            self._model = inputs.load_model(named, decoder=self._decoder)
        return self._model

    def facts(self) -> ModelFacts:
        """The model's name, and the digest of its weights where they are here."""
        from keye.commands.shared import inputs
        from keye.evals.run import ModelFacts, digest_weights

        arguments = self._arguments
        if arguments["servers"]:
            name = arguments["model"] or asyncio.run(_first_model(self()[0]))
            return ModelFacts(name, server=arguments["servers"])
        name = arguments["model"] or "nano"
        folder = inputs.find_model(name, arguments["mmproj"])
        engine = {key: str(arguments[key]) for key in (*_ENGINE, "through") if arguments.get(key) is not None}
        if (template := arguments["template"]) != "auto":
            engine["template"] = _digest_file(Path(template)) if Path(template).is_file() else template
        if arguments["adapter"] and (adapter := Path(arguments["adapter"].rpartition("=")[2])).is_dir():
            engine["adapter_weights"] = digest_weights(adapter)
        return ModelFacts(Path(name).name if Path(name).exists() else name, digest_weights(folder), engine)


def _digest_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


async def _first_model(worker: Any) -> str:
    """What the server calls its model."""
    try:
        await worker.start()
    finally:
        await worker.close()
    return str(worker.model)


def _key(name: str | None) -> str | None:
    from keye.config.environment import named_key

    return None if name is None else named_key(name)


def _judge(arguments: Mapping[str, Any]) -> Judge | None:
    if arguments["judge"] is None:
        if arguments["judge_model"] or arguments["judge_key"]:
            raise KeyeError("--judge-model and --judge-key are for a judge: name its server with --judge")
        return None
    from keye.batch.workers import ANSWER_SECONDS, ServerWorker
    from keye.evals.judge import Judge

    key, model = _key(arguments["judge_key"]), arguments["judge_model"]
    seconds = arguments["timeout"] or ANSWER_SECONDS

    def open_worker() -> Worker:
        return ServerWorker(
            arguments["judge"], model=model, key=key, slots=_JUDGE_SLOTS, tries=arguments["tries"], seconds=seconds
        )

    return Judge(open_worker, model, arguments["judge"])
