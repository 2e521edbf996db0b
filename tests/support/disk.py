"""A disk that fills up."""

from __future__ import annotations

import errno
from typing import Any, BinaryIO


class FullDisk:
    """A file on a disk that holds `room` more bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
