"""`keye eval rescore`: scores predictions that others made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from keye.commands.shared import options

if TYPE_CHECKING:
    from keye.evals.task import Task


@click.command(context_settings=options.CONTEXT)
@click.argument("file", type=options.PATH)
@click.option("--task", "name", required=True, metavar="NAME", help="The task that the predictions answer.")
@click.option("--scorer", "scorers", multiple=True, metavar="NAME",
              help="strict, or an official scorer; may be repeated.  [default: all of the task]")  # fmt: skip
@click.option(
    "--data",
    type=options.PATH,
    metavar="DIR",
    help="The task's data: for files whose rows lack the answers, and to count items without a prediction.",
)
@click.option("-o", "--output", type=options.PATH, metavar="DIR", help="Also write result and scores to this folder.")
@options.as_json
@options.debug
def rescore(
    file: Path, name: str, scorers: tuple[str, ...], data: Path | None, output: Path | None, as_json: bool
) -> int:
    """Score the predictions in FILE: samples of lmms-eval (.jsonl), a table of VLMEvalKit (.xlsx, .tsv), other JSON
    lines with id and prediction, or predictions.jsonl of keye eval.

    \b
    keye eval rescore samples_mlvu.jsonl --task mlvu_dev --scorer lmms-eval-0.7.3 --scorer strict
    keye eval rescore Model_Video-MME.xlsx --task videomme --data ~/data/Video-MME
    """
    from keye.commands.eval.show import print_results
    from keye.commands.shared import inputs, show
    from keye.evals.results.rescore import rescore as score_file
    from keye.evals.settings import data_folder

    task = _find_task(name, data)
    folder = None if data is None else data_folder(task, data)
    place = None if output is None else output / task.name
    result = score_file(file, task, list(scorers or task.scorers), folder=folder, output=place)
    if as_json:
        show.print_json(result)
    else:
        print_results([result])
        if result["withheld"]:
            inputs.note(f"no score: {result['withheld']}")
    return 0 if result["complete"] else 2


def _find_task(name: str, data: Path | None) -> Task:
    """The task of a name; of a family whose tasks are scored alike the first, where no data say which it is."""
    from keye.commands.shared import inputs
    from keye.evals.task import find_task, find_tasks

    tasks = find_tasks(name)
    if len(tasks) == 1 or data is not None or len({(task.scored_as, task.kind) for task in tasks}) > 1:
        return find_task(name)
    inputs.note(f"{name} stands for {', '.join(task.name for task in tasks)}, which are scored alike: {tasks[0].name}")
    return tasks[0]
