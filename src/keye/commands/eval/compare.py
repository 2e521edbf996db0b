"""`keye eval compare`: two results of the same tasks, item by item."""

from __future__ import annotations

from pathlib import Path

import click

from keye.commands.shared import options
from keye.errors import KeyeError


@click.command(context_settings=options.CONTEXT)
@click.argument("first", type=options.PATH, metavar="A")
@click.argument("second", type=options.PATH, metavar="B")
@options.as_json
@options.debug
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Compare two results item by item: how much better B is than A, with the interval of the difference.

    A and B are folders that keye eval wrote with -o, or those of one task in them. Differences of the same items are
    much surer than those of two scores. Items about one video go together.

    \b
    keye eval compare results-sparse results-dense
    """
    from keye.commands.eval.show import print_comparison
    from keye.commands.shared import show
    from keye.evals.results import compare as comparing

    ours, theirs = comparing.list_runs(first), comparing.list_runs(second)
    common = [task for task in ours if task in theirs]
    if not common:
        raise KeyeError(
            f"{first} has results of {', '.join(ours)}, and {second} of {', '.join(theirs)}: no common task"
        )
    data = [comparing.compare(comparing.read_run(ours[task]), comparing.read_run(theirs[task])) for task in common]
    if as_json:
        show.print_json({"comparisons": data})
        return
    for comparison in data:
        print_comparison(comparison)
