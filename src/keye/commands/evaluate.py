"""`keye eval`: a model's scores on questions with known answers."""

from __future__ import annotations

from typing import Any

import click

from keye.commands.shared import options


@click.group(name="eval", context_settings=options.CONTEXT)
def evaluate() -> None:
    """Measure a model on questions with known answers."""


@evaluate.command(context_settings=options.CONTEXT)
@click.option("--split", type=click.Choice(["test", "unseen"]), default="test", show_default=True,
              help="unseen: combinations and words that no training clip shows.")  # fmt: skip
@click.option("--frames", default="16-32", show_default=True, metavar="A-B", help="Fewest and most frames of a clip.")
@click.option("--objects", type=int, default=4, show_default=True, help="Most objects in a clip.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed asks other questions.")
@click.option("--n", "questions", type=int, default=2000, show_default=True, help="Number of questions.")
@click.option("--mode", type=click.Choice(["sparse", "dense"]), default="sparse", show_default=True,
              help="Attention of the decoder.")  # fmt: skip
@click.option("--select", type=click.Choice(["indexer", "random", "recent"]), default="indexer", show_default=True,
              help="Which keys sparse attention reads; random and recent are controls.")  # fmt: skip
@options.kv_format
@click.option("--mp4", is_flag=True, help="Write each clip to a video file and read it back.")
@options.running
@options.as_json
@options.debug
def frameforge(
    split: str, frames: str, objects: int, seed: int, questions: int, mode: str, select: str, kv: str | None, mp4: bool,
    as_json: bool, **arguments: Any,
) -> None:  # fmt: skip
    """Ask about generated videos whose answers are known exactly.

    \b
    keye eval frameforge --n 500
    keye eval frameforge --split unseen --frames 64-64 --json
    """
    from keye.commands.shared import inputs, show
    from keye.evals.report import print_report
    from keye.evals.tasks.frameforge import EvalOptions, parse_frames
    from keye.evals.tasks.frameforge import evaluate as run

    settings = EvalOptions(
        split=split, frames=parse_frames(frames), objects=objects, seed=seed, questions=questions,
        mode=mode, select=select, kv=kv or "auto", mp4=mp4,  # type: ignore[arg-type]
    )  # fmt: skip
    model = inputs.load_model(arguments)
    with show.progress_bar("asking") as advance:
        result = {"model": model.name, **run(model.runtime, settings, advance)}
    if as_json:
        show.print_json(result)
    else:
        print_report(result)
