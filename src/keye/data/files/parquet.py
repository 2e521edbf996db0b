"""Tables in parquet files, as `datasets` writes them. Row groups are read as one and the last few are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from keye.data.files.raw import PlainFile
from keye.data.files.rows import Offsets, Row
from keye.data.samples import BadRow, Place
from keye.errors import KeyeError, missing_package
from keye.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    import pyarrow

MAGIC: Final = b"PAR1"
#: Bytes of the largest row group, unpacked, and of those that are kept together.
MAX_GROUP: Final = 2 * GIB
_MOST_BYTES: Final = 512 * MIB
_MOST_WINDOW: Final = 8
_MAX_FOOTER: Final = 64 * MIB


class ParquetRows:
    """The rows of a parquet file."""

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise missing_package("pyarrow", f"{path} (parquet)", "train") from None
        self.path = path
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        self.digest = _hash_footer(PlainFile(path))
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            groups = [self._file.metadata.row_group(index) for index in range(self._file.metadata.num_row_groups)]
            counts, sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        except self._errors as error:
            raise self._broken(error) from None
        if sizes and max(sizes) > MAX_GROUP:
            raise KeyeError(
                f"{path} has a row group of {format_bytes(max(sizes))}, more than {format_bytes(MAX_GROUP)}; write it "
                "again with fewer rows a group (row_group_size=100)"
            )
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        mean = max(1, sum(sizes) // max(1, len(sizes)))
        self.window = max(1, min(_MOST_WINDOW, _MOST_BYTES // mean))
        self._groups = OrderedDict[int, "pyarrow.Table"]()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def blocks(self) -> Offsets | None:
        return np.unique(self._starts[:-1]) if len(self._starts) > 2 else None

    def place(self, index: int) -> Place:
        return Place(str(self.path), index + 1)

    def read(self, index: int) -> Row:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._group(number)
        try:
            (fields,) = table.slice(index - int(self._starts[number]), 1).to_pylist()
        except self._errors as error:
            raise BadRow(f"the row cannot be read ({str(error).splitlines()[0][:200]})") from None
        return Row(fields, self.place(index))

    def _group(self, number: int) -> pyarrow.Table:
        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        while len(self._groups) >= self.window:
            self._groups.popitem(last=False)
        try:
            self._groups[number] = self._file.read_row_group(number, use_threads=False)
        except self._errors as error:
            raise self._broken(error) from None
        return self._groups[number]

    def _broken(self, error: Exception) -> KeyeError:
        return KeyeError(
            f"{self.path} is not a valid parquet file ({str(error).splitlines()[0][:200]}); download it again"
        )


def _hash_footer(file: PlainFile) -> str:
    """What tells the content: the size, and the footer, which has the place and the statistics of all columns."""
    tail = file.read(max(0, file.size - 8), file.size)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or not 0 < length <= min(_MAX_FOOTER, file.size):
        raise KeyeError(f"{file.path} ends before its parquet footer; download it again")
    footer = file.read(file.size - 8 - length, file.size)
    return f"{file.size}-{hashlib.blake2b(footer, digest_size=8).hexdigest()}"
