"""The catalogue of a library: folders, states, scans, and what survives a killed process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keye.errors import KeyeError
from keye.library.catalog import Catalog

LATER = 4e9  # seconds: long after any file was written


def put(path: Path, content: bytes = b"video") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    for name in ("a.mp4", "b.MKV", "deep/c.webm", ".hidden.mp4", "notes.txt", ".git/d.mp4"):
        put(folder / name)
    return folder.resolve()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "library")


def add(catalog: Catalog, folder: Path) -> None:
    catalog.add_folder(folder)
    catalog.scan(now=LATER)


def test_videos_of_a_folder_are_discovered(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    assert [entry.path.relative_to(films).as_posix() for entry in catalog.entries()] == [
        "a.mp4",
        "b.MKV",
        "deep/c.webm",
    ]
    assert {entry.state for entry in catalog.entries()} == {"discovered"}


def test_a_file_that_is_still_written_waits(catalog: Catalog, films: Path) -> None:
    status = (films / "a.mp4").stat()
    catalog.add_folder(films)
    catalog.scan(now=status.st_mtime + 1)
    assert "a.mp4" not in {entry.path.name for entry in catalog.entries()}
    catalog.scan(now=status.st_mtime + 3)
    assert "a.mp4" in {entry.path.name for entry in catalog.entries()}


def test_changed_and_vanished_videos(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    for entry in catalog.entries():
        catalog.index_path(entry).write_bytes(b"index")
        assert catalog.update(entry, "indexed", searchable=5.0, duration=5.0)
    put(films / "a.mp4", b"another video")
    (films / "b.MKV").unlink()
    report = catalog.scan(now=LATER)
    assert (report.added, report.changed, report.removed) == (0, 1, 1)
    states = {entry.path.name: (entry.state, entry.searchable, entry.bytes) for entry in catalog.entries()}
    assert states == {"a.mp4": ("discovered", 0.0, 0), "c.webm": ("indexed", 5.0, 5)}
    assert catalog.used_bytes() == 5


def test_a_folder_that_is_away_keeps_its_videos(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    films.rename(films.with_name("unmounted"))
    report = catalog.scan(now=LATER)
    assert "not there now" in report.problems[0] and len(catalog.entries()) == 3


def test_removing_a_folder_deletes_its_indexes_alone(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    for entry in catalog.entries():
        catalog.index_path(entry).write_bytes(b"index")
    assert catalog.remove_folder(films) == 15
    assert catalog.entries() == [] and catalog.used_bytes() == 0 and (films / "a.mp4").exists()
    with pytest.raises(KeyeError, match="not in the library"):
        catalog.remove_folder(films)


@pytest.mark.parametrize("name", ["a.mp4", "nothing"])
def test_only_folders_are_added(catalog: Catalog, films: Path, name: str) -> None:
    with pytest.raises(KeyeError, match="not a folder"):
        catalog.add_folder(films / name)


def test_overlapping_folders_are_rejected(catalog: Catalog, films: Path) -> None:
    catalog.add_folder(films)
    for other in (films / "deep", films.parent):
        with pytest.raises(KeyeError, match="overlaps"):
            catalog.add_folder(other)


def test_videos_of_a_killed_process_are_taken_up_again(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    script = (
        "import os, sys; from pathlib import Path; from keye.library.catalog import Catalog\n"
        "catalog = Catalog(Path(sys.argv[1]))\n"
        "with catalog.working() as is_mine:\n"
        "    assert is_mine; entry = catalog.claim(); catalog.update(entry, 'indexing', searchable=2.5); os._exit(9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(catalog.folder)], env=os.environ, check=False)
    assert ended.returncode == 9
    assert [entry.state for entry in catalog.entries()].count("indexing") == 1
    with catalog.working() as is_mine:
        assert is_mine and not catalog.entries("indexing")
        entry = catalog.claim()
        assert entry is not None and entry.searchable == 2.5  # begun before all others
        with Catalog(catalog.folder).working() as is_second:
            assert not is_second


def test_changes_are_counted(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    before = catalog.last_change()
    entry = catalog.claim()
    assert entry is not None
    catalog.update(entry, "failed", reason="it is damaged")
    (changed,) = catalog.entries(since=before)
    assert (changed.id, changed.state, changed.reason) == (entry.id, "failed", "it is damaged")
    assert catalog.retry_failed() == 1 and not catalog.entries("failed")


def test_a_damaged_catalogue_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    Catalog(folder).close()
    (folder / "library.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(KeyeError, match="damaged"):
        Catalog(folder)


def test_the_limit_is_kept(catalog: Catalog) -> None:
    catalog.limit = 1 << 20
    assert Catalog(catalog.folder).limit == 1 << 20
    with pytest.raises(KeyeError, match="positive"):
        catalog.limit = 0


def test_a_video_that_changes_while_it_is_indexed_is_indexed_again(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    entry = catalog.claim()
    assert entry is not None
    catalog.index_path(entry).write_bytes(b"index")
    put(entry.path, b"another video")
    catalog.scan(now=LATER)
    assert not catalog.update(entry, "indexed", searchable=5.0)
    assert {known.state for known in catalog.entries()} == {"discovered"} and catalog.used_bytes() == 0


def test_ids_are_never_used_again(catalog: Catalog, films: Path, tmp_path: Path) -> None:
    add(catalog, films)
    entry = catalog.claim()
    assert entry is not None
    catalog.remove_folder(films)
    put(tmp_path / "others/z.mp4")
    add(catalog, tmp_path / "others")
    assert not catalog.update(entry, "indexed", searchable=50.0)
    (other,) = catalog.entries()
    assert other.state == "discovered" and other.id > entry.id


def test_a_lost_index_is_made_again(catalog: Catalog, films: Path) -> None:
    add(catalog, films)
    for entry in catalog.entries():
        catalog.update(entry, "indexed", searchable=5.0)
    assert catalog.scan(now=LATER).changed == 3 and {entry.state for entry in catalog.entries()} == {"discovered"}


def test_a_name_that_is_not_text_is_left_out(catalog: Catalog, films: Path) -> None:
    (Path(os.fsdecode(bytes(films) + b"/\xff.mp4"))).write_bytes(b"video")
    catalog.add_folder(films)
    report = catalog.scan(now=LATER)
    assert any("not valid UTF-8" in problem for problem in report.problems) and len(catalog.entries()) == 3


@pytest.mark.parametrize("name", ["x" * 3000, "~no-such-user/x", "a\0b"])
def test_what_cannot_be_a_path_is_one_sentence(catalog: Catalog, name: str) -> None:
    for work in (catalog.add_folder, catalog.remove_folder):
        with pytest.raises(KeyeError, match="cannot be a folder|not a folder|not in the library"):
            work(Path(name))
