"""The command line: the table of verbs. Each verb's module is imported when it is used, so that help costs nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from keye.commands.shared import options
from keye.commands.shared.group import LazyGroup, Verb, run
from keye.version import __version__

VERBS = {
    "ask": Verb("keye.commands.ask:ask", "answer a question about videos and images"),
    "ground": Verb("keye.commands.ground:ground", "find when something happens in a video"),
    "index": Verb("keye.commands.index:index", "read a video once and keep it in a file for questions"),
    "live": Verb("keye.commands.live:live", "play a video as if it were live and ask about it again and again"),
    "plan": Verb("keye.commands.plan:plan", "show which frames would be sampled and what they cost"),
    "batch": Verb("keye.commands.batch:batch", "answer the questions of a file, once each, by many workers"),
    "serve": Verb("keye.commands.serve:serve", "serve a model over HTTP, for OpenAI clients and the browser"),
    "inspect": Verb("keye.commands.inspect:inspect", "show what a model is made of and what fits in this machine"),
    "train": Verb("keye.commands.train:train", "train a model by the stages of a TOML file"),
    "eval": Verb("keye.commands.evaluate:evaluate", "measure a model on questions with known answers"),
    "doctor": Verb("keye.commands.doctor:doctor", "check this machine and this installation"),
}

#: Set before a verb's module, and with it torch, is imported. Threads that wait sleep: where other programs want the
#: cores too, spinning makes a small model up to 50 times slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
#: The same for training, which meets many batch shapes, whose kernels should stay in the cache.
TRAIN_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}


@click.command(cls=LazyGroup, verbs=VERBS, context_settings=options.CONTEXT)
@click.version_option(__version__, prog_name="keye")
@options.debug
def cli() -> None:
    """Understand long video with open models, on the machine you own.

    \b
    keye ask video.mp4 "when is the red circle visible?"
    keye ground video.mp4 "the red circle" --clips found
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a failure of ours, 2 a mistake of the user, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, value in (ENVIRONMENT | (TRAIN_ENVIRONMENT if "train" in arguments else {})).items():
        os.environ.setdefault(name, value)
    return run(cli, arguments)


if __name__ == "__main__":
    sys.exit(main())
