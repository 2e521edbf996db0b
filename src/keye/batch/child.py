"""A process with an engine, for one batch: what to load comes as a line of JSON on standard input, questions come over
a socket in a folder of their owner. It ends when standard input does, that is with the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from typing import Any

import uvicorn

from keye.errors import KeyeError


def main() -> None:
    """Reads what to do, and does it until the end."""
    told = json.loads(sys.stdin.readline())
    tempfile.tempdir = told["folder"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        model = load_engine(told["settings"])
    except KeyeError as error:
        sys.exit(f"keye: {error}")

    from keye.batch.workers import local_app

    app = local_app(model, told["slots"], private=told["private"])
    config = uvicorn.Config(
        app, uds=told["socket"], log_level="warning", access_log=False, lifespan="on",
        timeout_keep_alive=24 * 3600,  # one that closes just when it is used again would look like a lost worker
    )  # fmt: skip
    _Server(config).run()


def load_engine(settings: dict[str, Any]) -> Any:
    """The model of `settings`: the arguments of `keye.load`, and `threads`."""
    import torch

    import keye

    given = {name: value for name, value in settings.items() if value is not None}
    if threads := given.pop("threads", None):
        torch.set_num_threads(threads)
    return keye.load(given.pop("model"), **given)


class _Server(uvicorn.Server):
    """Says when it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            print("ready", flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)  # nothing here has to be saved, and a step of the engine may take long


if __name__ == "__main__":
    main()
