"""Workers as the decode service sees them, and those that are processes of this machine. Knows no priorities.

Results come in shared memory: a file without a name, in `/dev/shm` where there is room, which the worker writes and the
service maps, so frames are copied once. A worker that dies leaves nothing behind.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from keye.cluster.decode_work import Work
from keye.cluster.pool_worker import DONE, Answer
from keye.errors import KeyeError
from keye.media.pixels.patches import Pixels
from keye.units import format_bytes
from keye.version import PACKAGE_FOLDER

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from keye.cluster.pool_worker import main; main({})"
_PACKAGE_ROOT = str(PACKAGE_FOLDER.parent)
_SHARED_MEMORY = Path("/dev/shm")
#: The node that all processes of this machine are on.
HERE = "local"


class WorkerDied(Exception):
    """A worker ended, or its node did, in the middle of its work; the last line says why, where that is known."""


class PoolWorker(Protocol):
    """One worker. All of it blocks, and raises `WorkerDied`; only `stop` may be called from another thread."""

    @property
    def node(self) -> str: ...

    def hello(self) -> Answer:
        """Waits until it has started."""

    def check(self) -> None:
        """`WorkerDied` where it ended while it had nothing to do."""

    def begin(self, work: Work) -> Answer: ...

    def finish(self, buffer_bytes: int) -> tuple[Answer, Pixels]:
        """Makes what was begun: the answer, and the buffer, uint8 [buffer_bytes]."""

    def drop(self) -> None:
        """Cancels the work that was begun."""

    def stop(self) -> None:
        """Ends the worker; may be called twice."""


class Pool(Protocol):
    """Where workers come from."""

    def start(self) -> Sequence[PoolWorker]: ...

    def replace(self, worker: PoolWorker) -> PoolWorker | None:
        """A new worker for one that died; None where there is no place for one any more."""

    def close(self) -> None: ...


class LocalPool:
    """`count` processes of this machine."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise KeyeError(f"{count} decode workers were asked for; it must be 1 or more")
        self._count = count

    def start(self) -> list[LocalWorker]:
        return [LocalWorker() for _ in range(self._count)]

    def replace(self, worker: PoolWorker) -> LocalWorker:
        return LocalWorker()

    def close(self) -> None:
        """Nothing is left when the workers have been stopped."""


class LocalWorker:
    """A process that answers on a socket. It ends with this process, whatever that ends of."""

    node = HERE

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        paths = [_PACKAGE_ROOT, *(os.path.abspath(path) for path in sys.path if path)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(theirs.fileno()), json.dumps(paths)],
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self._connection = Connection(ours.detach())

    def hello(self) -> Answer:
        return self._answer()

    def check(self) -> None:
        if self.process.poll() is not None:
            raise WorkerDied

    def begin(self, work: Work) -> Answer:
        self._send("begin", work)
        return self._answer()

    def finish(self, buffer_bytes: int) -> tuple[Answer, Pixels]:
        with shared_file(buffer_bytes) as file:
            self._send("finish", None)
            try:
                send_handle(self._connection, file.fileno(), self.process.pid)
            except OSError:
                raise WorkerDied from None
            answer = self._answer()
            if not buffer_bytes or answer[0] != DONE:
                return answer, np.empty(0, np.uint8)
            mapped = mmap.mmap(file.fileno(), buffer_bytes, prot=mmap.PROT_READ)
            return answer, np.frombuffer(mapped, np.uint8)

    def drop(self) -> None:
        self._send("drop", None)

    def stop(self) -> None:
        # The socket is closed with this object: a thread may be waiting for it.
        self.process.kill()
        self.process.wait()

    def _send(self, order: str, argument: Any) -> None:
        try:
            self._connection.send((order, argument))
        except OSError:
            raise WorkerDied from None

    def _answer(self) -> Answer:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerDied from None


def shared_file(nbytes: int) -> IO[bytes]:
    """An unnamed file of `nbytes` reserved bytes: in memory where they are free, else on disk."""
    for folder in (_SHARED_MEMORY, None):
        if folder is not None and not folder.is_dir():
            continue
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
        with suppress(OSError):
            # Without its bytes being certain, a write to a mapped file where memory is full would end the process.
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            elif nbytes:
                os.ftruncate(file.fileno(), nbytes)
            return file
        file.close()
    raise KeyeError(f"{format_bytes(nbytes)} of frames have no room in {_SHARED_MEMORY} nor in {tempfile.gettempdir()}:"
                    " make room there, or lower the byte budget of the decode service")  # fmt: skip
