"""What a worker process is kept from on this system: a process confines itself and tries. Knows no media."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from keye.errors import MediaError
from keye.media.decode.sandbox import confine
from keye.media.decode.wire import INFO, send

_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENOSYS)


@dataclass(frozen=True)
class Confinement:
    """Which layers hold. `memory`: a limit on it. `reading`, `writing`: files cannot be opened for it. `network`: no
    sockets. `processes`: none can be started, nor another program take this one's place. `signals`: none to others.
    `privileges`: root's are given up and none can be had again."""

    memory: bool
    reading: bool
    writing: bool
    network: bool
    processes: bool
    signals: bool
    privileges: bool

    @property
    def complete(self) -> bool:
        return all(asdict(self).values())

    def sentence(self) -> str:
        """One clause for people: what is limited, and what is not."""
        layers = asdict(self)
        active = ", ".join(name for name, holds in layers.items() if holds) or "nothing"
        open_ = ", ".join(name for name, holds in layers.items() if not holds)
        return f"decode workers are confined: {active}" + (f"; not on this system: {open_}" if open_ else "")


def measure_confinement() -> Confinement:
    """Starts a worker and lets it try. Raises `RuntimeError` where workers cannot start."""
    from keye.media.decode.workers import DecodeLimits, Worker  # Not needed by the process that tries.

    with tempfile.TemporaryFile() as file:
        worker = Worker(
            "keye.media.decode.confinement", file, {}, DecodeLimits(memory_bytes=1 << 30, cpu_seconds=60,
            wait_seconds=60.0), name="the trial", what="decode worker",
        )  # fmt: skip
    try:
        kind, body = worker.receive(1 << 12)
        assert kind == INFO
        return Confinement(**json.loads(bytes(body)))
    except MediaError as error:
        raise RuntimeError(str(error)) from None
    finally:
        worker.close()


def attempts(memory_bytes: int, parent: int, scratch: str) -> dict[str, list[Callable[[], object]]]:
    """What a confined process tries, by the layer that is to prevent all of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "memory": [lambda: bytearray(2 * memory_bytes)],
        "reading": [lambda: os.open(sys.executable, os.O_RDONLY), lambda: os.listdir("/")],
        "writing": [lambda: os.open(scratch, os.O_CREAT | os.O_WRONLY), lambda: os.mkdir(scratch)],
        "network": [socket.socket, lambda: socket.socket(socket.AF_UNIX), socket.socketpair],
        # No such program: where nothing forbids it, that is the error, and this process goes on.
        "processes": [_fork, lambda: os.execv("/nonexistent/program", ["program"])],
        "signals": [lambda: os.kill(parent, 0)],
        "privileges": [
            lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * memory_bytes, 2 * memory_bytes)),
            lambda: _raise_errno(libc.setuid(12345)),
        ],
    }


def is_rejected(attempt: Callable[[], object]) -> bool:
    """Whether the system forbids it. Failing for another reason counts as not forbidden."""
    try:
        attempt()
    except (MemoryError, ValueError):
        return True  # ValueError: the standard library's error for a limit that may not be raised.
    except OSError as error:
        return error.errno in _FORBIDDEN
    return False


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _raise_errno(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "refused")


def main(arguments: list[str]) -> None:
    """Arguments: the options as JSON, and an inherited descriptor, which is not used."""
    options = json.loads(arguments[0])
    parent, scratch = os.getppid(), f"/tmp/keye-trial-{os.getpid()}"
    tried = attempts(options["memory_bytes"], parent, scratch)
    confine(options["memory_bytes"], options["cpu_seconds"])
    layers = {name: all(map(is_rejected, tried[name])) for name in (field.name for field in fields(Confinement))}
    send(sys.stdout.buffer, INFO, json.dumps(layers).encode())
