"""The worker process that renders a checkpoint's chat templates (`template_worker`), kept between prompts.

Starting Python takes longer than rendering, so that one process serves many prompts. Each has its own limit of
processor time; a process that broke a limit is ended, and the next prompt starts another.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError

_WORKER: Final = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True)
class TemplateLimits:
    """What rendering a template may take. Processor time is the limit that counts, since a template is not to
    blame for a busy machine; `wait_seconds` holds where processor time cannot be limited."""

    cpu_seconds: int = 5
    wait_seconds: float = 120.0
    memory_bytes: int = 1 << 29
    max_chars: int = 16_000_000


class TemplateProcess:
    """Renders templates in a worker process, one at a time; callers in several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def render(self, name: str, template: str, variables: Mapping[str, Any], nonce: str, limits: TemplateLimits) -> str:
        """The text that the template writes. KeyeError, with `name`, where it fails or breaks a limit."""
        request = {"template": template, "variables": variables, "nonce": nonce, "max_chars": limits.max_chars,
                   "memory_bytes": limits.memory_bytes, "cpu_seconds": limits.cpu_seconds}  # fmt: skip
        with self._lock:
            answer = self._ask(name, json.dumps(request).encode() + b"\n", limits.wait_seconds)
            if "error" in answer:  # it may have used memory that it does not release
                self._end()
        if "error" in answer:
            raise KeyeError(f"{name} cannot be rendered ({answer['error']}): load it with template keye or correct it.")
        return str(answer["text"])

    def close(self) -> None:
        """Ends the worker; a later prompt starts another."""
        with self._lock:
            self._end()

    def _ask(self, name: str, line: bytes, wait_seconds: float) -> dict[str, Any]:
        if self._worker is None or self._worker.poll() is not None:
            self._end()
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        worker = self._worker
        assert worker.stdin is not None and worker.stdout is not None
        clock = threading.Timer(wait_seconds, worker.kill)
        clock.daemon = True
        clock.start()
        try:
            worker.stdin.write(line)
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:
            line = b""
        except BaseException:  # an interrupt: what the worker still writes belongs to no later prompt
            self._end()
            raise
        finally:
            clock.cancel()
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._broken(name) from None
        assert isinstance(answer, dict)
        return answer

    def _broken(self, name: str) -> KeyeError:
        """What to say of a worker that gave no answer; it is ended."""
        worker, self._worker = self._worker, None
        assert worker is not None
        _, trouble = worker.communicate()
        if worker.returncode < 0:
            return KeyeError(
                f"{name} does not come to an end (it may loop for ever): load it with template keye or correct it."
            )
        reason = (trouble.decode(errors="replace").strip().splitlines() or ["its process ended without an answer"])[-1]
        return KeyeError(f"{name} cannot be rendered ({reason[:200]}): load it with template keye.")

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


#: The one worker of this process. It ends by itself when its standard input is closed.
templates: Final = TemplateProcess()
atexit.register(templates.close)
