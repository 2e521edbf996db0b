"""A click group that imports its commands when they are used, and exit codes for whatever can go wrong.

Imports nothing heavy: this is all that `keye -h` loads.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from keye.commands.shared.options import spelled
from keye.errors import KeyeError, KeyeWarning
from keye.units import one_line

DEFECT, MISTAKE, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Verb:
    """Where a command lives ("module:attribute") and its line in the help of the group."""

    target: str
    summary: str


class LazyGroup(click.Group):
    """A group of `verbs` by name; listing them imports none."""

    def __init__(self, *args: Any, verbs: Mapping[str, Verb], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verbs = dict(verbs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        module, _, attribute = self.verbs[cmd_name].target.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in self.verbs.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.verbs:
            near = difflib.get_close_matches(args[0], self.verbs, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            ctx.fail(f"no command {args[0][:80]!r}: {hint}Commands are {', '.join(self.verbs)}.")
        name, command, rest = super().resolve_command(ctx, args)
        params = command.params if command is not None else []
        flags = {"-", "--", "-h", "--help"}.union(*((*param.opts, *param.secondary_opts) for param in params))
        for place, argument in enumerate(rest):  # a file whose name begins like a flag must not be taken for one
            if argument.startswith("-") and argument.partition("=")[0] not in flags and os.path.isfile(argument):
                rest[place] = os.path.join(os.curdir, argument)
        return name, command, rest


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code. An error becomes one sentence on standard error;
    `--debug` among the arguments adds the traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that lacks a character shows another one
            reconfigure(errors="replace")
    try:
        with _noted_warnings():
            code = command.main(list(arguments), prog_name="keye", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except SystemExit as leaving:  # how click and rich leave when the reader of a pipe has gone
        return leaving.code if isinstance(leaving.code, int) else DEFECT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return DEFECT
    except Exception as error:  # noqa: BLE001 - the last resort, where a defect becomes a sentence and an exit code
        return _explain(error, debug="--debug" in arguments)


@contextmanager
def _noted_warnings() -> Iterator[None]:
    """Warnings of settings that were not honoured, as notes on standard error; others as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", KeyeWarning)
        usual, printed = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if isinstance(message, KeyeWarning):
                from keye.commands.shared.inputs import note

                if (sentence := message.worded(spelled)) not in printed:
                    printed.add(sentence)
                    note(sentence)
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _explain(error: Exception, *, debug: bool) -> int:
    """Prints the sentence for `error` and returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx is not None else "keye"
        return _print_error(f"{error.format_message()} See {where} -h.", MISTAKE)
    if isinstance(error, click.ClickException):
        return _print_error(error.format_message(), MISTAKE)
    if isinstance(error, KeyeError):
        return _print_error(error.worded(spelled), MISTAKE)
    hint = "" if debug else "; run again with --debug to see where"
    return _print_error(
        f"unexpected {type(error).__name__}: {one_line(str(error))[:300] or 'no message'}{hint}", DEFECT
    )


def _print_error(sentence: str, code: int) -> int:
    print(f"keye: {one_line(sentence)}", file=sys.stderr)
    return code
