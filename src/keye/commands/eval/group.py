"""`keye eval TASK...`, and the verbs beside it."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any, Final

import click

from keye.commands.shared import options
from keye.errors import KeyeError

#: Where each verb is, and its line in the help. A task must not have the name of one.
VERBS: Final = {
    "run": ("keye.commands.eval.run:run", "ask a model the questions of tasks and score it (what TASK... stands for)"),
    "list": ("keye.commands.eval.tasks:list_tasks", "list the tasks, where their data come from, and what is here"),
    "prepare": ("keye.commands.eval.tasks:prepare", "check the data of a task; --download fetches them"),
    "curve": ("keye.commands.eval.curve:curve", "scores over frames, and sparse against dense attention"),
    "compare": ("keye.commands.eval.compare:compare", "compare two results item by item"),
    "rescore": ("keye.commands.eval.rescore:rescore", "score predictions that others made"),
    "frameforge": ("keye.commands.evaluate:frameforge", "generated videos whose answers are known exactly"),
    "needle": ("keye.commands.evaluate:needle", "search generated films for short events"),
}


class _Group(click.Group):
    """A group whose first argument is a verb or, if it is none, the first task of a run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*VERBS, "-h", "--help"):
            if not args[0].startswith("-"):
                _check_name(args[0])
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        command: Any = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])


def _check_name(name: str) -> None:
    """`KeyeError` for what is neither a task nor, by a slip, a verb."""
    from keye.evals.task import find_tasks

    if verbs := get_close_matches(name, VERBS, 1):
        try:
            find_tasks(name)
        except KeyeError as error:
            raise KeyeError("{}; did you mean {}?", str(error).partition(":")[0], verbs[0]) from None
    find_tasks(name)


@click.group(name="eval", cls=_Group, context_settings=options.CONTEXT)
def evaluate() -> None:
    """Measure a model on benchmarks, with named scorers, intervals and settings in the result.

    \b
    keye eval list
    keye eval timelens_charades --data ~/data -o results
    keye eval mmmu mlvu --server http://one:8000 --key MY_KEY -o results --limit 200
    keye eval compare results-a results-b
    keye eval rescore samples.jsonl --task mlvu_dev --scorer lmms-eval-0.7.3
    """
