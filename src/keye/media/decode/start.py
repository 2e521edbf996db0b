"""How a process that demuxes or decodes starts: what is imported lazily comes first, since nothing can be read from
disk once it has confined itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO

import av

from keye.media.decode.sandbox import Reach, confine
from keye.media.decode.video_file import LAZY
from keye.media.decode.wire import report_crashes

#: Answers requests: (media file, requests, messages to the other side, options).
Serve = Callable[[BinaryIO, BinaryIO, BinaryIO, dict[str, Any]], None]


def enter_confinement(options: dict[str, Any], modules: Sequence[str] = (), reach: Reach | None = None) -> None:
    """Confines this process by the limits in `options`, with PyAV and `modules` imported."""
    for name in (*LAZY, *modules):
        with suppress(ImportError):
            import_module(name)
    av.logging.set_level(av.logging.PANIC)
    confine(options["memory_bytes"], options["cpu_seconds"], reach)


def run_worker(
    arguments: Sequence[str], serve: Serve, modules: Callable[[dict[str, Any]], Sequence[str]] = lambda _: ()
) -> None:
    """Serves one file, confined. Arguments: the options as JSON, and the inherited descriptor of the file or pipe.
    `modules` says what to import besides, by the options."""
    options = json.loads(arguments[0])
    enter_confinement(options, modules(options))
    report_crashes(sys.stdout.buffer)
    with os.fdopen(int(arguments[1]), "rb", buffering=0) as file:
        try:
            serve(file, sys.stdin.buffer, sys.stdout.buffer, options)
        except BrokenPipeError:
            # The reader has gone away; leave without the interpreter's own flush of standard output.
            os._exit(0)
