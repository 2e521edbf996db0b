"""The output of a batch holds complete records, each once, whatever happens to its writer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.batch.journal import Done, Journal, check_same
from keye.errors import KeyeError


def record(name: str, *, ok: bool = True, text: str = "yes") -> dict[str, Any]:
    return {"id": name, "line_digest": f"d{name}", "text": text, "error": None if ok else {"message": "no"}}


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_what_was_written_is_known_again(out: Path) -> None:
    with Journal(out) as journal:
        journal.append(record("a"))
        journal.append(record("b", ok=False))
    with Journal(out) as journal:
        assert journal.done == {"a": Done("da", True), "b": Done("db", False)}


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.data())
def test_a_kill_at_any_byte_loses_at_most_the_last_record(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("kill") / "out.jsonl"
    with Journal(out) as journal:
        for number, text in enumerate(texts):
            journal.append(record(str(number), text=text))
    complete = out.read_bytes()
    least = len('{"line_digest":"')  # of a first record less is not known as ours
    cut = data.draw(st.just(0) | st.integers(least, len(complete)))
    out.write_bytes(complete[:cut])
    with Journal(out) as journal:
        stored = (complete[:cut] + b"\n" if complete[cut : cut + 1] == b"\n" else complete[:cut]).count(b"\n")
        assert list(journal.done) == [str(number) for number in range(stored)]
        for number in range(stored, len(texts)):
            journal.append(record(str(number), text=texts[number]))
    assert out.read_bytes() == complete


def test_two_batches_never_write_to_one_file(out: Path) -> None:
    with Journal(out), pytest.raises(KeyeError, match="another keye batch writes to"):
        Journal(out)
    with Journal(out) as journal:
        journal.append(record("a"))
        journal.forget({"a"})  # another file of the same name now, which is held as well
        with pytest.raises(KeyeError, match="another keye batch writes to"):
            Journal(out)


def test_records_are_taken_out_in_one_step(out: Path) -> None:
    with Journal(out) as journal:
        for name in "abc":
            journal.append(record(name))
        journal.forget({"b"})
        journal.append(record("d"))
    assert ids(out) == ["a", "c", "d"] and list(out.parent.iterdir()) == [out]


OF_OTHERS = (
    "notes of mine", "notes\n", '{"id": "a"}\n', "{", '{"a": 1}\n{"b": 2}\n', '{"accuracy":0.93}', '{"id":"a"}',
    '{"id":"a","text":"cut', '{"line_digest":"mine"}', "7", "\0\0", "[" * 200_000, "1" * 5000, "\ufeff{}\n", "\n",
    json.dumps(record("a")) + "\n" + '{"id":"mine","more":1}', json.dumps(record("a")) + "\nnotes",
)  # fmt: skip


@pytest.mark.parametrize("text", OF_OTHERS)
def test_a_file_of_another_kind_is_left_alone(out: Path, text: str) -> None:
    out.write_text(text)
    with pytest.raises(KeyeError, match="choose another file with -o"):
        Journal(out)
    assert out.read_text() == text


def test_records_of_earlier_versions_go_on(out: Path) -> None:
    """They began with the id; a torn one is known beside whole ones."""
    line = json.dumps(record("a"), separators=(",", ":"))
    out.write_text(line + "\n" + line.replace('"a"', '"b"')[:30])
    with Journal(out) as journal:
        assert list(journal.done) == ["a"]
    assert out.read_text() == line + "\n"


def test_pipes_and_folders_are_no_outputs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(KeyeError, match="choose another"):
            Journal(path)


def test_a_link_to_an_output_stays_a_link(tmp_path: Path) -> None:
    link, out = tmp_path / "link.jsonl", tmp_path / "real" / "out.jsonl"
    out.parent.mkdir()
    link.symlink_to(out)
    with Journal(link) as journal:
        journal.append(record("a"))
        journal.append(record("b"))
        journal.forget({"a"})
    assert link.is_symlink() and ids(out) == ["b"] and list(out.parent.iterdir()) == [out]


def test_a_file_with_a_record_twice_is_refused(out: Path) -> None:
    out.write_text((json.dumps(record("a")) + "\n") * 2)
    with pytest.raises(KeyeError, match="two records of 'a'"):
        Journal(out)


def test_a_full_disk_leaves_whole_records(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    write = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) > 5:
            return write(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with Journal(out) as journal:
        journal.append(record("a"))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(KeyeError, match="no room is left"):
            journal.append(record("b"))
        assert list(journal.done) == ["a"]
    assert ids(out) == ["a"]


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="cannot be written"):
        Journal(tmp_path / "missing" / "out.jsonl")


def test_an_answer_to_another_question_is_refused_and_an_error_asked_again() -> None:
    done = {"a": Done("1", True), "b": Done("1", False)}
    assert check_same([("a", "1"), ("b", "1"), ("c", "9")], done, Path("out")) == []
    assert check_same([("a", "1"), ("b", "2")], done, Path("out")) == ["b"]
    with pytest.raises(KeyeError, match="out answers 'a' as the manifest or the options were before"):
        check_same([("a", "2"), ("b", "2")], done, Path("out"))


def test_an_output_that_nothing_was_written_to_is_removed(out: Path) -> None:
    with Journal(out):
        pass
    assert not out.exists()
    out.touch()
    with Journal(out):
        pass
    assert out.exists(), "it was there before"


def test_a_line_that_is_too_long_is_not_read_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Private: a record of the true limit would take 256 MiB.
    monkeypatch.setattr("keye.batch.journal._MOST_BYTES", 100)
    out.write_text(json.dumps(record("a", text="x" * 200)) + "\n")
    with pytest.raises(KeyeError, match="line 1 of .* is not a record"):
        Journal(out)
