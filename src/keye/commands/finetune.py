"""`keye finetune`: a model learns from a user's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.train.finetune.names import own_name, rename_flags

if TYPE_CHECKING:
    from keye.train.finetune.settings import FinetuneSettings
    from keye.train.recipes.family.config import FamilyConfig

_SWITCH: dict[str, Any] = {"default": None}
#: Samples that are laid out before each run.
_STARTING_SAMPLES = 20


class MediaRows(click.ParamType):
    """A number of rows, or all of them."""

    name = "rows"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "all":
            return None
        if not str(value).isdigit():
            self.fail(f"{value!r} is not a number of rows, nor all.", param, ctx)
        return int(value)


class FinetuneCommand(click.Command):
    """A command that takes flags under the names of other trainers too; help lists keye's alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, rename_flags(args))
        except click.NoSuchOption as error:
            from keye.train.finetune.foreign import find_reason

            if (reason := find_reason(own_name(error.option_name))) is None:
                raise
            raise click.UsageError(f"leave {error.option_name} out: {reason}.", ctx) from None


data = options.combine(
    click.option("-o", "--output", metavar="DIR", help="Folder of the adapter, or of the model with --method full."),
    click.option("--val-data", multiple=True, metavar="FILE", help="Data that is measured and not learnt from; "
                 "may be repeated."),
    click.option("--weights", metavar="N,N", help="How often the rows of each DATA come in an epoch, as 2,1."),
    click.option("--columns", metavar="A=B,...", help="Names of columns in the data: messages=dialog."),
    click.option("--root", metavar="DIR", help="Folder that media paths are relative to.  [default: that of the file]"),
    click.option("--data", multiple=True, hidden=True),
    click.option("--model", hidden=True),
)  # fmt: skip
what = options.combine(
    click.option("--method", type=click.Choice(["lora", "full"]), help="An adapter, or all weights.  [default: lora]"),
    click.option("--quant", type=click.Choice(["int4", "int8", "none"]), help="Quantise the frozen base (QLoRA)."),
    click.option("--lora-rank", type=options.COUNT, metavar="N", help="Rank of the adapter.  [default: 16]"),
    click.option("--lora-alpha", type=options.Positive(), help="Its outputs count alpha / rank.  [default: 32]"),
    click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), help="[default: 0]"),
    click.option("--rslora/--no-rslora", **_SWITCH, help="It counts alpha / sqrt(rank).  [default: no]"),
    click.option("--target-modules", multiple=True, metavar="NAME",
                 help="Layers that get an adapter, as q_proj; may be repeated.  [default: all-linear]"),
    click.option("--lora-experts/--no-lora-experts", **_SWITCH, help="Routed experts too.  [default: no]"),
    click.option("--freeze-vision/--no-freeze-vision", **_SWITCH, help="[default: frozen]"),
    click.option("--freeze-projector/--no-freeze-projector", **_SWITCH, help="[default: frozen]"),
    click.option("--freeze-llm/--no-freeze-llm", **_SWITCH, help="The language model.  [default: not frozen]"),
    click.option("--freeze-indexer/--no-freeze-indexer", **_SWITCH, help="Of sparse attention.  [default: frozen]"),
)  # fmt: skip
how = options.combine(
    click.option("--learning-rate", type=options.Positive(), help="[default: 1e-4, with --method full 1e-5]"),
    click.option("--vision-lr", type=options.Positive(), help="Of the vision tower.  [default: the same]"),
    click.option("--projector-lr", type=options.Positive(), help="Of the projector.  [default: the same]"),
    click.option("--optimizer", type=click.Choice(["adamw", "muon"]), help="[default: adamw]"),
    click.option("--lr-schedule", type=click.Choice(["cosine", "linear", "constant"]), help="[default: cosine]"),
    click.option("--warmup-steps", type=click.IntRange(0), metavar="N",
                 help="Steps over which learning rates rise.  [default: 10]"),
    click.option("--warmup-ratio", type=click.FloatRange(0, 1), help="The same as a share of the run, if longer."),
    click.option("--weight-decay", type=click.FloatRange(0), help="[default: 0]"),
    click.option("--clip", type=options.Positive(), help="Largest norm of a gradient.  [default: 1]"),
    click.option("--epochs", type=options.Positive(), help="Passes over the data.  [default: 1]"),
    click.option("--max-steps", type=options.COUNT, metavar="N", help="Steps, where fewer than the epochs have."),
    click.option("--batch-size", type=options.COUNT, metavar="N",
                 help="Packs (samples without packing) of a pass in each process.  [default: 1]"),
    click.option("--gradient-accumulation", type=options.COUNT, metavar="N",
                 help="Passes whose gradients make a step.  [default: 1]"),
    click.option("--max-length", type=options.COUNT, metavar="N",
                 help="Most tokens of a sample, and of a pack.  [default: 8192, or the context]"),
    click.option("--too-long", type=click.Choice(["error", "drop"]),
                 help="What happens to a longer sample; none is cut.  [default: error]"),
    click.option("--packing/--no-packing", **_SWITCH, help="Several samples share a pass.  [default: yes]"),
    click.option("--gradient-checkpointing/--no-gradient-checkpointing", **_SWITCH,
                 help="Save memory by computing layers twice.  [default: yes]"),
)  # fmt: skip
media = options.combine(
    click.option("--fps", type=options.Positive(), help="Frames a second of videos whose sample says nothing."),
    *(click.option(options.flag(name), name, type=options.COUNT, metavar="N", help=f"The same: {text}.")
      for name, text in (("nframes", "number of frames"), ("min_frames", "fewest frames"),
                         ("max_frames", "most frames"), ("min_pixels", "fewest pixels of a frame or image"),
                         ("max_pixels", "most pixels of a frame or image"),
                         ("video_total_pixels", "most pixels of all frames"))),
)  # fmt: skip
machine = options.combine(
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cpu]"),
    click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="[default: bfloat16]"),
    click.option("--threads", type=options.COUNT, metavar="N", help="Processor threads.  [default: all]"),
    click.option("--processes", type=options.COUNT, metavar="N", help="Processes on the CPU.  [default: 1]"),
    click.option("--save-steps", type=options.COUNT, metavar="N", help="Save every N steps too, not only by minutes."),
    click.option("--save-total-limit", type=options.COUNT, metavar="N", help="Checkpoints that are kept."),
    click.option("--eval-steps", type=options.COUNT, metavar="N", help="Measure --val-data every N steps."),
    click.option("--samples", type=click.IntRange(0, 50), metavar="N",
                 help="Questions of --val-data that are answered before and after.  [default: 3]"),
    click.option("--resume/--no-resume", default=True, show_default=True,
                 help="Go on at the last checkpoint of the output folder; --no-resume rejects a folder with a run."),
)  # fmt: skip


@click.command(cls=FinetuneCommand, context_settings=options.CONTEXT)
@click.argument("words", nargs=-1, metavar="MODEL DATA...")
@data
@what
@how
@media
@machine
@click.option("--config", type=options.PATH, metavar="FILE", help="TOML with the names of these flags, which win.")
@click.option("--from", "foreign", type=options.PATH, metavar="FILE",
              help="Print such a file for one of ms-swift (.sh, .yaml) or LLaMA-Factory (.yaml).")  # fmt: skip
@click.option("--print-config", is_flag=True, help="Print the run as a file of keye train.")
@click.option("--check", is_flag=True, help="Check data, samples, adapter, memory and time; exit with 1 for a fault.")
@click.option("--check-media", type=MediaRows(), default=200, metavar="N|all",
              help="Rows whose media --check opens.  [default: 200]")  # fmt: skip
@options.as_json
@options.debug
def finetune(
    words: tuple[str, ...], config: Path | None, foreign: Path | None, print_config: bool,
    check: bool, check_media: int | None, resume: bool, as_json: bool, **arguments: Any,
) -> int:  # fmt: skip
    """Teach a model from your data: conversations about videos, images and text.

    MODEL is a name (nano, 1.5, 2.0) or a folder; DATA are files or folders, whose format is detected. #2000 or #50%
    behind one takes so much of it. The output is an adapter, for --adapter of every command and for keye merge.
    Flags go by the names of ms-swift, LLaMA-Factory and transformers too (--lora_rank, --freeze_vit true).
    An interrupted run goes on when the command is run again.

    \b
    keye finetune 1.5 train.jsonl -o captions --check
    keye finetune 1.5 train.jsonl -o captions --val-data dev.jsonl --epochs 3
    keye finetune 2.0 train.jsonl more.json#50% -o captions --quant int4
    keye finetune --from swift.sh > captions.toml
    keye finetune --config captions.toml --learning-rate 5e-5
    """
    if foreign is not None:
        print_import(foreign)
        return 0
    settings = read_settings(words, config, arguments)
    run = plan_run(settings)
    if print_config:
        from keye.config.toml import to_toml

        print(to_toml(run), end="")
    elif check:
        return 0 if print_check(run, check_media, as_json=as_json) else 1
    else:
        start(run, settings, resume=resume, as_json=as_json)
    return 0


def plan_run(settings: FinetuneSettings) -> FamilyConfig:
    """The run that settings describe; the model's files are fetched where they are not on this machine."""
    from keye.commands.shared.inputs import find_model
    from keye.config import load_model_config
    from keye.train.finetune.settings import make_run

    folder = find_model(settings.model)
    return make_run(settings, folder, load_model_config(folder))


def print_check(run: FamilyConfig, media: int | None, *, as_json: bool) -> bool:
    """Prints what a check finds; whether it finds nothing."""
    from keye.commands.shared import inputs, show, show_finetune
    from keye.train.finetune.check import check_run

    with inputs.stderr().status("checking") as status:

        def report(what: str, done: int, total: int, left: float | None) -> None:
            words = "" if left is None else f", {show.time_left(left)}"
            status.update(f"checking {what}: {done:,} of {total:,}{words}")

        result = check_run(run, media=media, on_progress=report)
    show.print_json(result.to_dict()) if as_json else show_finetune.print_check(result, run)
    return result.is_clean


def start(run: FamilyConfig, settings: FinetuneSettings, *, resume: bool, as_json: bool) -> None:
    """Checks in short, trains, and says how the result is used."""
    from keye.commands.shared import inputs, show, show_finetune
    from keye.config.environment import launched_place
    from keye.train.finetune.check import check_run
    from keye.train.finetune.run import finetune as run_finetune
    from keye.train.loop import train
    from keye.train.recipes import find_recipe

    if (place := launched_place()) is not None and place[0] > 0:  # the first of torchrun's processes does the rest
        train(run, find_recipe(run.recipe), resume=resume)
        return
    with inputs.stderr().status("checking"):
        result = check_run(run, media=0, samples=_STARTING_SAMPLES)
    if result.problems:
        raise KeyeError("{}", result.problems[0])
    show_finetune.print_start(result, run, inputs.stderr())
    try:
        with show_finetune.TrainingProgress() as progress:
            outcome = run_finetune(
                run, questions=settings.samples, resume=resume, on_phase=progress.show_phase,
                on_report=show.print_json if as_json else progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        inputs.note(f"interrupted; run the command again to go on, the report so far is {run.output / 'report.html'}")
        raise
    if as_json:
        show.print_json(outcome.to_dict())
    else:
        show_finetune.print_answers(outcome.answers)
        show_finetune.print_usage(outcome, run, settings.model)


def print_import(path: Path) -> None:
    """Prints our TOML for a configuration of another trainer; what has no place in it as comments with reasons."""
    from keye.train.finetune.foreign import read_foreign

    print(read_foreign(path).to_toml(), end="")


def read_settings(words: Sequence[str], config: Path | None, arguments: dict[str, Any]) -> FinetuneSettings:
    """The settings of the file, those of the command line over them."""
    from keye.train.finetune.settings import load_settings

    names = {name: value for name, value in arguments.items() if value is not None and value != ()}
    if words and "model" not in names:
        names["model"], words = words[0], words[1:]
    if words:
        names["data"] = (*words, *names.get("data", ()))
    if "weights" in names:
        names["weights"] = [_number(text) for text in names["weights"].split(",")]
    if "columns" in names:
        pairs = [entry.partition("=") for entry in names["columns"].split(",")]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise KeyeError(f"--columns {wrong[0]} names no column of the data: give it as messages=dialog")
        names["columns"] = {name.strip(): value.strip() for name, _, value in pairs}
    if names.get("quant") == "none":
        names["quant"] = None
    return load_settings(config, names)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise KeyeError(f"--weights has {text!r}, which is not a number: give one for each DATA, as 2,1") from None
