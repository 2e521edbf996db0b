"""`keye eval frameforge` and `keye eval needle`: a model's scores on generated videos."""

from __future__ import annotations

from typing import Any

import click

from keye.commands.shared import options


@click.command(context_settings=options.CONTEXT)
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
    from keye.evals.figures.report import print_report
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


@click.command(context_settings=options.CONTEXT)
@click.option("--split", type=click.Choice(["test", "unseen"]), default="test", show_default=True,
              help="unseen: combinations that no training clip shows.")  # fmt: skip
@click.option("--films", type=int, default=2, show_default=True, help="Number of films.")
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Length of a film.")
@click.option("--questions", type=int, default=4, show_default=True,
              help="Events of a film that are searched, and as many that it never shows.")  # fmt: skip
@click.option("--event", type=float, default=2.0, show_default=True, help="Seconds that an event lasts: 0.5 to 10.")
@click.option("--near-misses", type=float, default=2.0, show_default=True,
              help="Events a minute that share colour or shape with what is searched.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed makes other films.")
@click.option("--budget", type=int, help="Most tokens of a question.  [default: that of keye find]")
@click.option("--no-baselines", is_flag=True, help="Leave out what one pass over the film reaches.")
@options.running
@options.as_json
@options.debug
def needle(
    split: str, films: int, minutes: float, questions: int, event: float, near_misses: float, seed: int,
    budget: int | None, no_baselines: bool, as_json: bool, **arguments: Any,
) -> None:  # fmt: skip
    """Search long generated films for short events whose times are known.

    \b
    keye eval needle
    keye eval needle --films 12 --minutes 120 --questions 10 --json
    """
    from keye.commands.shared import inputs, show
    from keye.evals.figures.report import print_needle_report
    from keye.evals.tasks.needle import NeedleOptions
    from keye.evals.tasks.needle import evaluate as run

    settings = NeedleOptions(
        split=split, films=films, minutes=minutes, questions=questions, event=event, near_misses=near_misses, seed=seed,
        budget=budget, baselines=not no_baselines,
    )  # fmt: skip
    model = inputs.load_model(arguments)
    with show.progress_bar("searching") as advance:
        result = {"model": model.name, **run(model, settings, advance)}
    if as_json:
        show.print_json(result)
    else:
        print_needle_report(result)
