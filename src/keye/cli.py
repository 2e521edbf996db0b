"""The command line: the table of verbs, and exit codes for whatever can go wrong.

Each verb's module is imported when it is used, so that help costs nothing.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from keye.commands.shared import options
from keye.commands.shared.options import spelled
from keye.errors import KeyeError, KeyeWarning
from keye.units import one_line
from keye.version import __version__

DEFECT, MISTAKE, INTERRUPTED = 1, 2, 130


#: Where a command is ("module:attribute") and its line in the help of the group.
Verb = tuple[str, str]


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
        module, _, attribute = self.verbs[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.verbs.items()])

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


VERBS = {
    "ask": ("keye.commands.ask:ask", "answer a question about videos and images"),
    "ground": ("keye.commands.ground:ground", "find when something happens in a video"),
    "find": ("keye.commands.find:find", "find the moments of an event in hours of video"),
    "index": ("keye.commands.index:index", "read a video once and keep it in a file for questions"),
    "scenes": ("keye.commands.scenes:scenes", "list the shots of a video, cut by cut"),
    "library": ("keye.commands.library:library", "keep folders of videos indexed and search all of them"),
    "watch": ("keye.commands.watch:watch", "report when something happens in a live source"),
    "live": ("keye.commands.live:live", "play a video as if it were live and ask about it again and again"),
    "plan": ("keye.commands.plan:plan", "show which frames would be sampled and what they cost"),
    "batch": ("keye.commands.batch:batch", "answer the questions of a file, once each, by many workers"),
    "serve": ("keye.commands.serve:serve", "serve a model over HTTP, for OpenAI clients and the browser"),
    "quantize": ("keye.commands.quantize:quantize", "write a model with weights of 4 or 8 bits"),
    "inspect": ("keye.commands.inspect:inspect", "show what a model is made of and what fits in this machine"),
    "convert": ("keye.commands.convert:convert", "write a model as GGUF, or a GGUF file as safetensors"),
    "finetune": ("keye.commands.finetune:finetune", "teach a model from your data, by an adapter or as a whole"),
    "merge": ("keye.commands.merge:merge", "write an adapter into its model, or the average of models"),
    "train": ("keye.commands.train:train", "train a model by the stages of a TOML file"),
    "eval": ("keye.commands.eval.group:evaluate", "measure a model on benchmarks and generated videos"),
    "doctor": ("keye.commands.doctor:doctor", "check this machine and this installation"),
}

#: Set before a verb's module, and with it torch, is imported. Threads that wait sleep: where other programs want the
#: cores too, spinning makes a small model up to 50 times slower. oneDNN keeps the kernels of 1024 shapes; torch's own
#: cache over it would keep as many again, at 0.3 MiB each or more, and makes nothing faster.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "LRU_CACHE_CAPACITY": "16"}


@click.command(cls=LazyGroup, verbs=VERBS, context_settings=options.CONTEXT)
@click.version_option(__version__, prog_name="keye")
@options.debug
def cli() -> None:
    """Understand long video with open models, on the machine you own.

    \b
    keye ask video.mp4 "when is the red circle visible?"
    keye ground video.mp4 "the red circle" --clips found
    keye find hours.mp4 "the red circle"
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a failure of ours, 2 a mistake of the user, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return run(cli, arguments)


if __name__ == "__main__":
    sys.exit(main())
