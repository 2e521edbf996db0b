"""Worker processes that read untrusted media: without privileges, under limits, their output validated.

A worker gets one open file, an empty environment and `/` as its folder, and confines itself (`sandbox`) before it
reads. This side bounds the time it waits and the length of every message, so that a
worker that has been taken over can only end its own job. What the messages mean is known to `video` and `image`."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, NoReturn

from keye.config.environment import worker_environment
from keye.errors import MediaError, Option
from keye.media.decode.wire import CRASH, ERROR, HEADER, MAX_WORDS
from keye.media.source.fetch import MAX_VIDEO_BYTES
from keye.version import PACKAGE_FOLDER

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from importlib import import_module; import_module(sys.argv[2]).main(sys.argv[3:])"
)
_PACKAGE_ROOT = str(PACKAGE_FOLDER.parent)
_SIGXCPU = 24
#: Signals by which people and systems end processes, and no process ends itself: HUP, INT, KILL, TERM.
_FROM_OUTSIDE = frozenset({1, 2, 9, 15})
#: In seconds; the system takes milliseconds in 32 bits.
_LONGEST_POLL = 1e6


@dataclass(frozen=True)
class DecodeLimits:
    """What a video may cost its decode worker. The pixel limit is checked before anything is decoded.

    `wait_seconds` is the longest wait for the next frame (or for the scan of the file), `total_seconds` for all of them
    together, both in wall time. `frames` and `duration` (seconds) limit what a file may hold, whatever is taken of it.
    """

    memory_bytes: int = 3 * 1024**3
    cpu_seconds: int = 3600
    wait_seconds: float = 600.0
    frame_pixels: int = 40_000_000
    file_bytes: int = MAX_VIDEO_BYTES
    threads: int = 1
    total_seconds: float = math.inf
    frames: int = 10_000_000
    duration: float = math.inf


#: For untrusted files.
UNTRUSTED_LIMITS = DecodeLimits(
    memory_bytes=2 * 1024**3, cpu_seconds=900, wait_seconds=60.0, total_seconds=900.0, frames=5_000_000,
    duration=24 * 3600.0,
)  # fmt: skip


class Worker:
    """A running worker. `name` is the medium, for sentences; `what` the program, such as "video decoder".

    With `untrusted` a defect of the worker counts as the file's fault, since an untrusted file may provoke one.
    """

    def __init__(
        self,
        module: str,
        file: BinaryIO,
        options: dict[str, Any],
        limits: DecodeLimits,
        *,
        name: str,
        what: str,
        untrusted: bool = False,
    ) -> None:
        self.limits, self.name, self.what, self.untrusted = limits, name, what, untrusted
        self._waited = 0.0
        #: Why this side has killed the worker.
        self._verdict: MediaError | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        try:
            sandbox = {"memory_bytes": limits.memory_bytes, "cpu_seconds": limits.cpu_seconds}
            self.process = _start(module, file, {**options, **sandbox}, self._log)
        except BaseException:
            self._log.close()
            raise

    def stop(self) -> None:
        """Kills the worker; a reader in another thread gets an error, and closes."""
        if self.process.poll() is None:
            self._kill(MediaError(f"reading of {self.name} was stopped"))

    def close(self) -> None:
        """Ends the worker. May be called more than once."""
        self.stop()
        process = self.process
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # Closing flushes; the killed worker no longer reads.
                    stream.close()

    def request(self, request: dict[str, Any]) -> None:
        """Writes one request."""
        assert self.process.stdin is not None
        if self.process.stdin.closed:
            raise self._death()
        descriptor, data = self.process.stdin.fileno(), json.dumps(request).encode() + b"\n"
        begin = time.monotonic()
        while data:
            if not _ready(descriptor, select.POLLOUT, self._patience(begin)):
                self._give_up()
            try:
                data = data[os.write(descriptor, data) :]
            except BrokenPipeError:
                raise self._death() from None
        self._waited += time.monotonic() - begin

    def receive(self, most: int) -> tuple[bytes, bytearray]:
        """The kind and the body, of at most `most` bytes, of the next message. Raises what an ERROR message says."""
        kind, length = HEADER.unpack(self._read_exactly(HEADER.size))
        if length > (MAX_WORDS if kind in (ERROR, CRASH) else most):
            raise self.broken()
        body = self._read_exactly(length)
        if kind == CRASH:
            defect = RuntimeError(f"the {self.what} failed: {body.decode(errors='replace')}")
            if self.untrusted:
                raise self.broken() from defect
            raise defect
        if kind == ERROR:
            raise self._worker_error(body)
        return kind, body

    def broken(self) -> MediaError:
        """Ends a worker that does not keep to what was agreed; the error to raise."""
        return self._kill(MediaError(f"{self.name} broke the {self.what} or its memory limit; re-encode it"))

    def _kill(self, verdict: MediaError) -> MediaError:
        self._verdict = self._verdict or verdict
        self.process.kill()
        return verdict

    def _worker_error(self, body: bytearray) -> MediaError:
        try:
            sentence, *options = json.loads(bytes(body))
            words = [sentence, *options]
            if not all(isinstance(word, str) and word.isprintable() for word in words):
                return self.broken()
            error = MediaError("{} " + sentence, self.name, *map(Option, options)) if options else None
            if error is not None:
                str(error)  # A sentence with more gaps than options is none that our own worker would send.
        except (ValueError, TypeError, LookupError, RecursionError):
            return self.broken()
        return error or MediaError(f"{self.name} {sentence}")

    def _patience(self, begin: float) -> float:
        """Seconds left to wait, of a wait that began at `begin`."""
        waited = time.monotonic() - begin
        return min(self.limits.wait_seconds - waited, self.limits.total_seconds - self._waited - waited)

    def _read_exactly(self, count: int) -> bytearray:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        data = bytearray(count)
        view = memoryview(data)
        begin, filled = time.monotonic(), 0
        while filled < count:
            left = self._patience(begin)
            # Without any patience it is an error even if the answer has come already: the same on every machine.
            if (left <= 0 and not filled) or not _ready(descriptor, select.POLLIN, left):
                self._give_up()
            chunk = os.readv(descriptor, [view[filled:]])
            if chunk == 0:
                raise self._death()
            filled += chunk
        self._waited += time.monotonic() - begin
        return data

    def _give_up(self) -> NoReturn:
        most = min(self.limits.wait_seconds, self.limits.total_seconds)
        raise self._kill(
            MediaError(f"{self.name} took more than {most:g} s to decode; re-encode it smaller or cut it into parts")
        )

    def _death(self) -> Exception:
        """Why the worker ended without a word: it was killed, it met a limit (the file's fault), or a defect (ours)."""
        code = self.process.wait()
        if self._verdict is not None:
            return self._verdict
        if -code in _FROM_OUTSIDE:
            return MediaError(
                f"the {self.what} of {self.name} was ended from outside, perhaps because memory ran out; try again"
            )
        if code == -_SIGXCPU:
            return MediaError(
                f"{self.name} needs more than {self.limits.cpu_seconds} s of processor time to decode; "
                "re-encode it smaller or cut it into parts"
            )
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").strip()
        # Once confined a worker cannot write to the log, so words in it tell of one that never came to read the file.
        if code < 0 or "MemoryError" in log or (self.untrusted and not log):
            return self.broken()
        return RuntimeError(f"the {self.what} failed with code {code}: {log or 'no message'}")


def _ready(descriptor: int, event: int, seconds: float) -> bool:
    """Whether a pipe can be used, or has ended, within a time. `poll` takes descriptors above 1023; `select` does
    not."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(math.ceil(1000 * max(min(seconds, _LONGEST_POLL), 0))))


def _start(module: str, file: BinaryIO, options: dict[str, Any], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The worker process: without the environment, site packages' hooks, the parent's folder and descriptors."""
    paths = [_PACKAGE_ROOT, *(os.path.abspath(path) for path in sys.path if path)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", BOOT, json.dumps(paths), module, json.dumps(options), str(file.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=(file.fileno(),),
        env=worker_environment(),
        cwd="/",
        bufsize=0,
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process
