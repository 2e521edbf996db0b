"""This machine's cores and memory, and child processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from keye.errors import KeyeError

#: Limit and use of this process's control group (version 2), where a container sets one.
_GROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory; `free` can still be had."""

    device: str
    total: int
    free: int


def main_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> Memory | None:
    """Memory of the processor: what Linux says, or the limit of a container where that is lower. None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[-1] == "kB"}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or the word "max"
        return Memory("cpu", total, free)
    return Memory("cpu", min(total, limit), max(0, min(free, limit - used)))


def release_memory() -> None:
    """Gives the free pages of the C library's heap back to the system, where it can (glibc). Of what blocks of ever
    other sizes leave free, it uses little again."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def memories() -> list[Memory]:
    """Main memory and that of every GPU that torch can use."""
    import torch

    result = [memory for memory in [main_memory()] if memory is not None]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            result.append(Memory(f"cuda:{i}", total, free))
    return result


def memory_on(device: str) -> Memory | None:
    """The memory of "cpu", "cuda" or "cuda:1"; None where it is not known."""
    kind, _, index = device.partition(":")
    name = kind if kind == "cpu" else f"{kind}:{index or 0}"
    return next((memory for memory in memories() if memory.device == name), None)


def check_device(device: str) -> None:
    """`KeyeError` for a torch device that cannot run a model here."""
    import torch

    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, TypeError) as error:
        raise KeyeError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if kind == "meta":
        raise KeyeError("device 'meta' cannot be used here: it holds shapes without numbers; choose cpu or cuda")


def set_threads(threads: int) -> None:
    """Has torch compute with so many threads. `KeyeError` for more than this process has cores."""
    import torch

    if threads > (cores := available_cores()):
        raise KeyeError(f"threads is {threads}, but only {cores} cores can be used here; set it to at most {cores}")
    torch.set_num_threads(threads)


class ChildProcess:
    """A Python process that ends with this one, because its standard input does (`watch_stdin`), and that reports once
    when it is ready: one JSON line on a pipe whose descriptor is its last argument (`report_ready`).

    `arguments` follow the interpreter; `message` is sent as one JSON line on standard input. The child leads a process
    group of its own, so that Ctrl-C in a terminal reaches this process alone. Its standard output is discarded.
    """

    def __init__(self, arguments: Sequence[str], message: Mapping[str, Any] | None = None) -> None:
        self._reports, descriptor = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, *arguments, str(descriptor)], pass_fds=(descriptor,), start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(descriptor)
        self._stdin = self._process.stdin
        assert self._stdin is not None
        if message is not None:
            with suppress(BrokenPipeError):
                self._stdin.write(json.dumps(message).encode() + b"\n")
                self._stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def read_report(self) -> dict[str, Any] | None:
        """Blocks until the child reports; None where it ends before. To be called once."""
        with os.fdopen(self._reports, "rb") as pipe:
            line = pipe.readline()
        report = json.loads(line) if line.endswith(b"\n") else None
        return report if isinstance(report, dict) else None

    def wait(self, timeout: float | None = None) -> None:
        """Blocks until it has ended; `subprocess.TimeoutExpired` after `timeout` seconds."""
        self._process.wait(timeout)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """Ends the child and its children."""
        if self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Closes standard input, which ends a child that still runs."""
        assert self._stdin is not None
        with suppress(BrokenPipeError):
            self._stdin.close()


def report_ready(descriptor: int, report: Mapping[str, Any]) -> None:
    """Sends the one report of a `ChildProcess`."""
    with suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as pipe:
        pipe.write(json.dumps(report).encode() + b"\n")


def watch_stdin(end: Callable[[], object]) -> None:
    """Calls `end` in a thread when standard input ends, that is when the process that holds its other end is gone."""

    def watch() -> None:
        sys.stdin.read()
        end()

    Thread(target=watch, name="stdin watch", daemon=True).start()


def end_with_parent() -> None:
    """In a process of `multiprocessing`: ends it as soon as the one that started it is gone, however that ended."""
    parent = parent_process()
    assert parent is not None, "only started processes have a parent to end with"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, name="parent watch", daemon=True).start()


def leave_terminal() -> None:
    """Called in a process that helps another: Ctrl-C reaches only the one that was started from the terminal, which
    decides what happens, and this process ends with it."""
    os.setsid()
    end_with_parent()
