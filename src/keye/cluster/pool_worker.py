"""The process of this machine that does decode work, and the desk that every worker sits at, here or on a cluster.

Without torch, but for what a release's resizing needs. Decoding itself happens in confined processes below this one
(`keye.media.decode.workers`).
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, Final

import numpy as np

from keye.cluster.decode_work import Absent, BegunCall, BegunVideo, Sink, Work
from keye.errors import KeyeError
from keye.media.pixels.patches import Pixels

#: What a worker answers: it worked, the work is at fault, the file is not here, or keye is at fault.
DONE, REJECTED, ABSENT, DEFECT = "done", "rejected", "absent", "defect"
Answer = tuple[str, Any]
#: Codecs that a worker must be able to decode, of those that people's videos have.
NEEDED: Final = ("h264", "hevc", "vp9", "mpeg4")


class Desk:
    """One piece of work at a time, in two steps."""

    def __init__(self) -> None:
        self._begun: BegunVideo | BegunCall | None = None

    def hello(self) -> Answer:
        """Whether this worker is fit for work: its node's name, or what it lacks."""
        host = socket.gethostname()
        if missing := missing_codecs():
            return REJECTED, (f"the decode worker on {host} cannot decode {missing}: install PyAV there from its own "
                              "wheels, with `pip install --force-reinstall av`")  # fmt: skip
        return DONE, host

    def begin(self, work: Work) -> Answer:
        """Makes the next result known: (its bytes, those of its buffer)."""
        self.drop()

        def begin() -> tuple[int, int]:
            self._begun = work.begin()
            return self._begun.nbytes, self._begun.buffer_bytes

        return answer_of(begin)

    def finish(self, sink: Sink) -> Answer:
        """Makes the result: its buffer goes to `sink`, the rest is returned."""
        begun = self._begun
        assert begun is not None, "nothing was begun"
        try:
            return answer_of(lambda: begun.write(sink))
        finally:
            self.drop()

    def drop(self) -> None:
        """Cancels the work that was begun."""
        if self._begun is not None:
            self._begun.close()
            self._begun = None


def answer_of(make: Any) -> Answer:
    """What `make` returns or raises, as an answer that can travel."""
    try:
        return DONE, make()
    except Absent:
        return ABSENT, None
    except KeyeError as error:
        return REJECTED, error
    except Exception:  # noqa: BLE001 - raised again by the service, with this text
        return DEFECT, traceback.format_exc()


def missing_codecs() -> str:
    """The codecs that are needed and not here, or "video" where PyAV itself cannot be loaded; empty if all is well."""
    try:
        from av.codec import Codec
        from av.codec.codec import UnknownCodecError
    except ImportError:
        return "video"
    missing = []
    for name in NEEDED:
        try:
            Codec(name, "r")
        except UnknownCodecError:
            missing.append(name)
    return ", ".join(missing)


def file_sink(descriptor: int) -> Sink:
    """Writes pieces behind one another into an open file."""
    place = 0

    def sink(piece: Pixels) -> None:
        nonlocal place
        data = memoryview(np.ascontiguousarray(piece).data).cast("B")
        while data:
            count = os.pwrite(descriptor, data, place)
            data, place = data[count:], place + count

    return sink


def main(descriptor: int) -> None:
    """Answers on a connection until it ends. Ctrl-C is for the process that started this one, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    desk, connection = Desk(), Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        connection.send(desk.hello())
        while True:
            order, argument = connection.recv()
            if order == "begin":
                connection.send(desk.begin(argument))
            elif order == "finish":
                target = recv_handle(connection)
                try:
                    answer = desk.finish(file_sink(target))
                finally:
                    os.close(target)
                connection.send(answer)
            else:
                desk.drop()
