"""`keye serve` as a child of another: it ends as by SIGTERM when the process that started it does."""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> int:
    """Runs the command of the arguments."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    from keye.commands.group import run
    from keye.commands.serve import serve

    assert sys.argv[1] == "serve"
    return run(serve, sys.argv[2:])


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
