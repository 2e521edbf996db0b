"""A file of segments loses nothing that was complete: to a kill, a full disk, or bytes that anyone may have written."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import pytest
import torch

from keye import KeyeError
from keye.cache.index_file import ALIGN, PRELUDE_BYTES
from keye.cache.segments import (
    SegmentWriter,
    check_segments,
    is_segmented,
    map_segment,
    open_for_writing,
    read_segments,
)
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore
from keye.ops.kv_blocks import KV_BLOCK, RowFormat
from tests.support.disk import FullDisk

LAYOUT = KVLayout(
    2, {"k": RowFormat("int4", 1, 32), "v": RowFormat("int4", 1, 32), "indexer_k": RowFormat("bfloat16", 1, 16)},
    ("indexer_k",),
)  # fmt: skip


def sequence(seed: int, length: int) -> KVCache:
    """A sequence of random rows."""
    generator, cache = torch.Generator().manual_seed(seed), KVCache(2, KVStore(LAYOUT))
    for layer in range(2):
        cache.append(layer, {
            name: torch.randn(length, form.heads, form.dim, generator=generator) for name, form in LAYOUT.rows.items()
        })  # fmt: skip
    return cache


def write(writer: SegmentWriter, seed: int) -> None:
    """A segment of two sequences of 70 and 20 tokens, in three blocks."""
    caches = [sequence(seed, 70), sequence(seed + 1, 20)]
    writer.append("rows", {"seed": seed}, caches, LAYOUT, torch.full((4, 3 * KV_BLOCK), seed))


def make(path: Path, segments: int = 3) -> list[int]:
    """A file of a head and some segments of rows; returns where each ends."""
    writer = SegmentWriter.create(path, "head", {"name": "film"})
    for seed in range(segments):
        write(writer, 10 * seed)
    writer.close()
    return [segment.start + segment.size for segment in writer.segments]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """The bytes of a file, and where its segments end."""
    path = tmp_path_factory.mktemp("segments") / "film.keye"
    ends = make(path)
    return path.read_bytes(), ends


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    make(path)
    head, *others = read_segments(path)
    assert (head.kind, head.about["name"], head.image) == ("head", "film", None)
    assert [segment.about["seed"] for segment in others] == [0, 10, 20] and is_segmented(path)
    assert len(check_segments(path)) == 4
    for segment in others:
        assert segment.image is not None and segment.start % ALIGN == 0
        mapped, check = map_segment(path, segment)
        blocks = KVStore(LAYOUT).adopt(segment.image.rows(mapped), segment.image.blocks)
        for seed, first, count, length in ((segment.about["seed"], 0, 2, 70), (segment.about["seed"] + 1, 2, 1, 20)):
            part = check.part(first, count)
            stored = KVCache.of_blocks(KVStore(LAYOUT), blocks[first : first + count], length, part)
            for name in LAYOUT.rows:
                part.compare(name, 1)
                encoded = sequence(seed, length).read_range(1, name, 0, length)
                assert torch.equal(stored.read_range(1, name, 0, length), encoded)
            assert part.damage is None


def test_a_file_cut_anywhere_has_the_segments_before(complete: tuple[bytes, list[int]], tmp_path: Path) -> None:
    data, ends = complete
    path, generator = tmp_path / "film.keye", random.Random(0)
    places = {*ends, *(end - 1 for end in ends[1:]), *(generator.randrange(ends[0], len(data)) for _ in range(12))}
    for place in sorted(places):
        path.write_bytes(data[:place])
        assert len(read_segments(path)) == sum(end <= place for end in ends)
        SegmentWriter(path).close()
        assert data.startswith(path.read_bytes())
    path.write_bytes(data[: ends[0] - 1])
    with pytest.raises(KeyeError, match="cut short"):
        read_segments(path)


def test_a_kill_leaves_what_was_complete(complete: tuple[bytes, list[int]], tmp_path: Path) -> None:
    """Bytes of a segment without its prelude are ignored, and the next writer writes the same file."""
    data, ends = complete
    path = tmp_path / "film.keye"
    start = read_start = -(-ends[1] // ALIGN) * ALIGN
    tail = bytes(PRELUDE_BYTES) + data[start + PRELUDE_BYTES : ends[2]]
    for cut in (0, PRELUDE_BYTES, len(tail) // 2, len(tail)):
        path.write_bytes(data[:read_start] + tail[:cut])
        assert len(read_segments(path)) == 2
        writer = SegmentWriter(path)
        write(writer, 10)
        write(writer, 20)
        writer.close()
        assert path.read_bytes() == data


@pytest.mark.parametrize("room", [0, 100, 5_000, 150_000])
def test_a_full_disk_leaves_what_was_complete(complete: tuple[bytes, list[int]], tmp_path: Path, room: int) -> None:
    data, ends = complete
    path = tmp_path / "film.keye"
    path.write_bytes(data[: ends[1]])
    writer = SegmentWriter(path, lambda path: cast(BinaryIO, FullDisk(open_for_writing(path), room)))
    with pytest.raises(KeyeError, match=r"no room is left to write .*film\.keye"):
        write(writer, 10)
    writer.close()
    assert [segment.kind for segment in check_segments(path)] == ["head", "rows"]
    writer = SegmentWriter(path)
    write(writer, 10)
    write(writer, 20)
    writer.close()
    assert path.read_bytes() == data


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    make(path, 1)
    writer = SegmentWriter(path)
    with pytest.raises(KeyeError, match="another process is writing to"):
        SegmentWriter(path)
    writer.close()
    SegmentWriter(path).close()


def test_two_that_begin_the_same_file(tmp_path: Path) -> None:
    """The second is refused; one whose file was replaced says so, and the file in its place stays as it is."""
    path = tmp_path / "film.keye"
    first = SegmentWriter.create(path, "head", {"name": "film"})
    with pytest.raises(KeyeError, match="another process is writing to"):
        SegmentWriter.create(path, "head", {"name": "film"})
    write(first, 10)
    assert [segment.kind for segment in read_segments(path)] == ["head", "rows"]
    other = tmp_path / "other.keye"
    make(other, 2)
    data = other.read_bytes()
    other.replace(path)
    with pytest.raises(KeyeError, match="another process is writing to"):
        write(first, 20)
    first.close()
    assert path.read_bytes() == data
    SegmentWriter.create(path, "head", {"name": "film"}).close()
    assert len(read_segments(path)) == 1


def test_a_disk_without_locks_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "film.keye"
    make(path, 1)
    monkeypatch.setattr("keye.cache.segments.fcntl.flock", refuse)
    for open_writer in (SegmentWriter, lambda path: SegmentWriter.create(path, "head", {})):
        with pytest.raises(KeyeError, match=r"film\.keye cannot be written \(No locks available\)"):
            open_writer(path)


def test_damage_is_said_and_not_taken_for_an_end(complete: tuple[bytes, list[int]], tmp_path: Path) -> None:
    data, ends = complete
    path, start = tmp_path / "film.keye", -(-ends[1] // ALIGN) * ALIGN

    def with_bytes(place: int, new: bytes) -> Path:
        path.write_bytes(data[:place] + new + data[place + len(new) :])
        return path

    with pytest.raises(KeyeError, match="has no beginning"):  # others follow it
        read_segments(with_bytes(start, bytes(PRELUDE_BYTES)))
    with pytest.raises(KeyeError, match="its header differs from its checksum"):
        read_segments(with_bytes(ends[2] - 5, b"?"))
    with pytest.raises(KeyeError, match="is not an index"):
        read_segments(with_bytes(0, b"no index"))
    with pytest.raises(KeyeError, match="differs from its checksum"):  # a row
        check_segments(with_bytes(start + ALIGN + 10, b"noise"))


def test_noise_in_a_file_ends_in_one_sentence(complete: tuple[bytes, list[int]], tmp_path: Path) -> None:
    """Headers and preludes with other bytes, their checksums right and wrong: an error or the same segments."""
    data, ends = complete
    path, generator = tmp_path / "film.keye", random.Random(7)
    starts = [0, *(-(-end // ALIGN) * ALIGN for end in ends[:-1])]
    for _ in range(150):
        changed, number = bytearray(data), generator.randrange(4)
        if generator.random() < 0.5:
            place = starts[number] + generator.randrange(PRELUDE_BYTES)
        else:
            place = ends[number] - 1 - generator.randrange(400 if number else 40)
        changed[place] = generator.randrange(256)
        path.write_bytes(changed[: generator.choice([len(changed), generator.randrange(len(changed))])])
        with suppress(KeyeError):
            assert len(read_segments(path)) <= 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 10**9), ("length", 10**15), ("length", -1), ("rows", {}), ("rows", None), ("tokens", None)],
)
def test_a_header_that_promises_more_than_the_file_has(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "film.keye"
    make(path, 1)
    writer = SegmentWriter(path)
    header = {
        "layers": 2, "length": 64,
        "rows": {"k": {"kind": "int4", "heads": 1, "dim": 32, "bytes": 1 << 40, "offset": ALIGN}},
        "tokens": {"offset": ALIGN, "bytes": 2048, "sha256": ""},
        "checksums": {"offset": ALIGN, "bytes": 8, "sha256": ""},
    }  # fmt: skip
    with pytest.raises(KeyeError, match="damaged"):
        writer.append("rows", {"storage": {**header, name: value}})
    writer.close()


def test_a_killed_process(tmp_path: Path) -> None:
    """kill -9 in the middle of appending: whatever the file has then is complete."""
    path = tmp_path / "film.keye"
    code = (
        "import sys; from pathlib import Path; from tests.cache.test_segments import make, write, SegmentWriter\n"
        f"path = Path({str(path)!r}); make(path, 1); writer = SegmentWriter(path)\n"
        "print('ready', flush=True)\n"
        "for seed in range(1000): write(writer, seed)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    while path.stat().st_size < 12 * ALIGN:
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(check_segments(path)) >= 2
    SegmentWriter(path).close()
    assert path.stat().st_size == read_segments(path)[-1].stop or path.stat().st_size % ALIGN
