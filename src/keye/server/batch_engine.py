"""An engine in a process of its own for `keye batch` (`keye.batch.workers.ProcessWorker`), and the application that it
and the engine in the command's own process serve.

    python -m keye.server.batch_engine DESCRIPTOR

What to load comes as a JSON line on standard input, questions come over a Unix socket. The process ends when standard
input does, that is with the process that started it; on DESCRIPTOR it reports when it listens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from keye.api import Keye, load
from keye.config.media import FetchLimits
from keye.errors import KeyeError
from keye.media.source.fetch import OwnersPolicy
from keye.process import report_ready, set_threads, watch_stdin
from keye.server.app import create_app
from keye.server.settings import Settings

#: What `python -m` runs.
MODULE: Final = "keye.server.batch_engine"
#: A day: in a batch a long video may take as long as it needs.
_REQUEST_SECONDS: Final = 24 * 3600.0
#: Connections stay open for as long: one that closes just as it is used again would look like a lost worker.
_KEEP_ALIVE_SECONDS: Final = 24 * 3600


def load_engine(settings: Mapping[str, Any]) -> Keye:
    """The model of `settings`: the arguments of `keye.load`, and `threads`."""
    options = {name: value for name, value in settings.items() if value is not None}
    if threads := options.pop("threads", None):
        set_threads(threads)
    return load(options.pop("model"), **options)


def local_app(model: Keye, slots: int, *, allow_private: bool = False) -> FastAPI:
    """The application of `keye serve` for the user of this machine: it opens files by their paths, and addresses of
    local networks if `allow_private`. Its clients can read what this user can, so it must not listen on a port."""
    settings = Settings(queue=max(slots, 1), request_seconds=_REQUEST_SECONDS, drain_seconds=0.0)
    return create_app(model, settings, policy=OwnersPolicy(limits=FetchLimits(allow_private=allow_private)))


def engine_app(settings: Mapping[str, Any], slots: int, allow_private: bool) -> FastAPI:
    """Loads the model of `settings` and makes its application."""
    return local_app(load_engine(settings), slots, allow_private=allow_private)


def main() -> None:
    """Reads the order, serves until standard input ends."""
    order, descriptor = json.loads(sys.stdin.readline()), int(sys.argv[1])
    tempfile.tempdir = order["folder"]
    watch_stdin(lambda: os._exit(0))  # nothing has to be saved, and a step of the engine may take long
    try:
        app = engine_app(order["settings"], order["slots"], order["allow_private"])
    except KeyeError as error:
        sys.exit(f"keye: {error}")
    config = uvicorn.Config(
        app, uds=order["socket"], log_level="warning", access_log=False, lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )  # fmt: skip
    _Server(config, descriptor).run()


class _Server(uvicorn.Server):
    """Reports when it listens."""

    def __init__(self, config: uvicorn.Config, descriptor: int) -> None:
        super().__init__(config)
        self._descriptor = descriptor

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            report_ready(self._descriptor, {})


if __name__ == "__main__":
    main()
