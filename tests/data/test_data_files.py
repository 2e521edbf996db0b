"""Files of rows: which kind they are, their lines, what is broken in them, and reading them at any place."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.data.files.open import open_rows
from keye.data.files.rows import RowFile
from keye.data.mixing import Order, Permutation
from keye.data.samples import BadRow
from keye.data.sources import DataSet, open_samples
from keye.errors import KeyeError
from keye.media.content import identify, source_hash
from keye.media.source.fetch import Source, as_source

TALK = {"query": "q", "response": "r"}


def texts(rows: RowFile) -> list[tuple[int, Any]]:
    return [(rows.place(index).line, rows.read(index).fields) for index in range(len(rows))]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lines_are_counted_past_blank_ones(end: str, bom: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(bom + end.join(['{"a": 1}', "", "  ", '{"a": "é"}', "", '{"a": 3}']), newline="")
    assert texts(open_rows(tmp_path / "a")) == [(1, {"a": 1}), (4, {"a": "é"}), (6, {"a": 3})]


def test_quoted_cells_may_have_lines_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text;image\n"one\n\ntwo";a\n\nthree;"b;""c"""\n')
    rows = [(2, {"text": "one\n\ntwo", "image": "a"}), (6, {"text": "three", "image": 'b;"c"'})]
    assert texts(open_rows(tmp_path / "a.csv")) == rows


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_entry_by_entry(indent: int | None, tmp_path: Path) -> None:
    entries = [{"a": "é]" * 5, "b": [1, {"c": "\\"}]}, {"a": "},{"}, {"a": 3.5}]
    (tmp_path / "a.json").write_text(json.dumps(entries, indent=indent, ensure_ascii=False))
    rows = open_rows(tmp_path / "a.json")
    assert [fields for _, fields in texts(rows)] == entries
    assert [line for line, _ in texts(rows)] == ([1, 2, 3] if indent is None else [2, 11, 14])


def test_a_list_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    entries = [{"a": f"{i}é" * 400} for i in range(9000)]
    (tmp_path / "a.json").write_text(json.dumps(entries, ensure_ascii=False))
    rows = open_rows(tmp_path / "a.json")
    assert [rows.read(index).fields for index in range(0, 9000, 500)] == entries[::500]
    assert len(rows) == 9000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json:2 is not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2 is not valid JSON: the file ends inside the list"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2 is not valid JSON: a comma"),
        ("a.json", b'{"a": \n}', "a.json:2 is not valid JSON"),
        ("a.json", b"hello", "begins with b'hello'"),
        ("a.json", b"\xff\xfe[\0", "UTF-16"),
        ("a.jsonl", b"PK\3\4", "a ZIP archive"),
        ("a.jsonl", b"a\0b", "not a file of rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b"", "no line with the names of its columns"),
        ("a.csv", b"video,start,end,text\n", "a.csv has no rows"),
        ("a.csv", b"a,a\n1,2\n", "or one of them twice"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12],
            "ends in the middle of its gzip data|not valid gzip",
        ),
        ("a.tar", b"x" * 600, "is not a tar file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KeyeError, match=reason):
        list(open_samples([DataSet(tmp_path / name)], seed=0, epochs=1))


@pytest.mark.parametrize("line", [b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b"[" * 100_000])
def test_lines_that_hold_no_text_are_bad_rows(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(BadRow):
        open_rows(tmp_path / "a.jsonl").read(1)


def test_a_folder_is_read_for_its_training_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00001.jsonl", "train-00000.jsonl", "test-00000.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps({"query": name, "response": "r"}) + "\n")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    samples = open_samples([DataSet(tmp_path)], seed=0, epochs=1)
    assert {str(sample.messages[0].parts[0]) for sample in samples} == {"train-00000.jsonl", "train-00001.jsonl"}


def test_any_place_of_a_compressed_file_is_read(tmp_path: Path) -> None:
    noise = random.Random(0)
    content = [json.dumps({"a": noise.randbytes(600).hex()}) for _ in range(12_000)]
    data = "\n".join(content).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[: 1 << 22], 1) + gzip.compress(data[1 << 22 :], 1))
    rows = open_rows(tmp_path / "a.jsonl.gz")
    blocks = rows.blocks
    assert blocks is not None
    assert len(blocks) > 2
    for index in (0, 11_999, *noise.sample(range(12_000), 12)):
        assert rows.read(index).fields == json.loads(content[index])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_a_permutation_has_every_place_once(count: int) -> None:
    order = [Permutation(count, 5)[place] for place in range(count)]
    assert sorted(order) == list(range(count))
    assert count < 7 or order != sorted(order)


@pytest.mark.parametrize("picked", [1000, 300, 2500])
def test_rows_in_blocks_come_block_by_block_in_a_shuffled_order(picked: int) -> None:
    blocks = np.arange(0, 1000, 50)
    order = Order(1000, picked, 3, 0, blocks, window=2)
    rows = [order[place] for place in range(picked)]
    assert len(set(rows)) == min(picked, 1000)
    blocks_of = [row // 50 for row in rows]
    for place in range(0, picked, 7):  # no more than a window and its neighbour within any short stretch
        assert len(set(blocks_of[place : place + 20])) <= 4
    assert rows != sorted(rows)
    later = Order(1000, picked, 3, 1, blocks, window=2)
    assert set(rows) == {later[place] for place in range(picked)}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_an_archive_has_a_row_for_each_name_and_its_media_stay_in_it(layout: int, tmp_path: Path) -> None:
    far = "y" * (90 if layout == tarfile.USTAR_FORMAT else 300)
    talk = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]}
    both = {"conversations": [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": "x"}]}
    path = write_tar(tmp_path / "s.tar", [
        ("./1.png", png(30, 20)), ("./1.txt", b"A dog."),
        (f"{far}/2.json", json.dumps(talk).encode()), (f"{far}/2.b.png", png(50, 40)),
        ("3.json", json.dumps({**both, "images": ["3.b.png", "3.a.png"]}).encode()),
        ("3.a.png", png(70, 60)), ("3.b.png", png(90, 80)),
        ("4.json", json.dumps({**talk, "image": "missing.png"}).encode()), ("4.png", png(1, 1)),
    ], layout)  # fmt: skip
    samples = open_samples([DataSet(path)], seed=0, epochs=1)
    rows = {sample.place.line: sample for sample in samples}
    (skip,) = samples.skipped
    assert (skip.place.line, skip.reason) == (4, "missing.png is not in the archive under the row's name")
    sources = [as_source(medium.source) for row in (1, 2, 3) for medium in rows[row].media]
    assert [size_of(source) for source in sources] == [(30, 20), (50, 40), (90, 80), (70, 60)]
    assert len({source_hash(source) for source in sources}) == len({identify(source) for source in sources}) == 4
    assert rows[1].plain


def size_of(source: Source) -> tuple[int, int]:
    assert source.path is None
    assert source.data is None
    with source.open() as file, Image.open(file) as picture:
        plain = picture.size
    with source.open_file() as file, Image.open(file) as picture:
        assert picture.size == plain
        assert file.fileno() > 0
    return plain


def test_an_archive_that_ends_inside_a_header_has_lost_rows(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"x" * 100), ("2.txt", b"y" * 100)], tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    for cut in (700, 1024 + 200):
        path.write_bytes(content[:cut])
        with pytest.raises(KeyeError, match="s.tar ends inside its headers; download it again"):
            open_rows(path)
    path.write_bytes(content[:2048])  # without the zeros that end an archive
    assert len(open_rows(path)) == 2


@pytest.mark.parametrize("cut", [700, 1500, 2600])
def test_a_damaged_archive_is_one_sentence(cut: int, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"x" * 900), ("2.txt", b"y" * 900)])
    path.write_bytes(path.read_bytes()[:cut] + (b"z" * 600 if cut == 1500 else b""))
    with pytest.raises(KeyeError, match="s.tar (is damaged at byte 1,536|ends inside its member)"):
        open_rows(path)


class TestParquet:
    """Files that `datasets` writes."""

    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self) -> None:
        pytest.importorskip("pyarrow", reason="pyarrow (extra train) is not installed")

    @staticmethod
    def write(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
        return path

    def test_messages_and_pictures_in_columns(self, tmp_path: Path) -> None:
        rows = [
            {"messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"q{i}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a{i}"}]}],
             "images": [{"bytes": png(10 + i, 10), "path": "x.png"}], "split": "train"}
            for i in range(7)
        ]  # fmt: skip
        samples = open_samples([DataSet(self.write(tmp_path / "a.parquet", rows))], seed=1, epochs=1)
        by_row = {sample.place.line: sample for sample in samples}
        assert sorted(by_row) == list(range(1, 8))
        for row, sample in by_row.items():
            medium, question = sample.messages[0].parts
            assert question == f"q{row - 1}"
            assert not isinstance(medium, str)
            data = as_source(medium.source).data
            assert data == png(9 + row, 10)

    def test_a_picture_under_another_name_is_asked_for(self, tmp_path: Path) -> None:
        row = {"pic": {"bytes": png(9, 9), "path": None}, "question": "q", "answer": "a"}
        path = self.write(tmp_path / "a.parquet", [row])
        with pytest.raises(KeyeError, match="the field pic holds a medium that is not read; name it with columns"):
            list(open_samples([DataSet(path)], seed=0, epochs=1))
        (sample,) = open_samples([DataSet(path, columns={"pic": "image"})], seed=0, epochs=1)
        assert len(sample.media) == 1

    def test_shards_in_a_folder_resume_in_the_middle(self, tmp_path: Path) -> None:
        for shard in range(3):
            self.write(tmp_path / f"train-{shard}.parquet", [{**TALK, "query": f"{shard} {i}"} for i in range(11)])
        expected = [sample.place for sample in open_samples([DataSet(tmp_path)], seed=2, epochs=2)]
        assert len(set(expected)) == 33
        for stop in (1, 16, 40):
            stream = open_samples([DataSet(tmp_path)], seed=2, epochs=2)
            before = [next(stream).place for _ in range(stop)]
            state = json.loads(json.dumps(stream.state()))
            after = [sample.place for sample in open_samples([DataSet(tmp_path)], seed=2, epochs=2, state=state)]
            assert before + after == expected

    def test_a_damaged_file_is_one_sentence(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.parquet", [TALK] * 9)
        data = path.read_bytes()
        path.write_bytes(data[:-30])
        with pytest.raises(KeyeError, match="ends before its parquet footer"):
            open_rows(path)
        path.write_bytes(data[:4] + bytes(len(data) - 200) + data[-196:])
        with pytest.raises(KeyeError, match="a.parquet"):
            list(open_samples([DataSet(path)], seed=0, epochs=1))
