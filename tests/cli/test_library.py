"""`keye library`, and `keye find --library`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from keye.hub import asset


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder of a video that can be read and one that is cut short, both written long ago."""
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(asset("demo.mp4"), folder / "demo.mp4")
    (folder / "broken.mp4").write_bytes(asset("demo.mp4").read_bytes()[:3000])
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def test_a_folder_is_indexed_and_searched(run: Callable, films: Path, tmp_path: Path) -> None:
    place = ("--library-folder", tmp_path / "library")
    added = run("library", "add", films, *place)
    assert added.code == 0 and "1 video indexed, 1 failed" in added.out
    listed = run("library", "list", *place)
    assert "demo.mp4: indexed" in listed.out and "broken.mp4: failed: broken.mp4 is not a video" in listed.out
    search = run("find", "--library", "the cyan triangle", *place, "--json", "--no-scope-notes")
    best = (*search.data["moments"], *search.data["weaker"])[0]
    assert best["file"] == str(films / "demo.mp4") and abs(best["start"] - 2.0) <= 0.5
    assert search.data["coverage"]["missing"][0]["file"] == str(films / "broken.mp4")
    removed = run("library", "remove", films, *place)
    assert removed.code == 0 and run("library", "list", *place, "--json").data["videos"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("find", "--library", "a.mp4", "a dog"), "--library searches its own videos"),
        (("find", "--library", "a dog", "--index", "x"), "--index belongs to a named video"),
        (("find", "a.mp4", "a dog", "--embedder", "clip"), "add --library"),
        (("find", "--library", "a dog"), "keye library add"),
        (("library", "remove", "nothing"), "is not in the library"),
        (("library", "add", "nothing"), "is not a folder"),
    ],
)
def test_mistakes_are_one_sentence(run: Callable, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    place = () if "--embedder" in arguments else ("--library-folder", tmp_path)
    result = run(*arguments, *place)
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1


def test_clips_of_videos_of_one_name_are_all_there(run: Callable, films: Path, tmp_path: Path) -> None:
    (films / "deep").mkdir()
    shutil.copy(films / "demo.mp4", films / "deep/demo.mp4")
    os.utime(films / "deep/demo.mp4", (1e9, 1e9))
    place = ("--library-folder", tmp_path / "library")
    run("library", "add", films, *place)
    search = run("find", "--library", "the cyan triangle", *place, "--clips", tmp_path / "clips", "--json")
    assert len(search.data["moments"]) == len(set(search.data["clips"])) == 2
    assert sorted(map(str, (tmp_path / "clips").iterdir())) == sorted(search.data["clips"])


def test_the_result_is_there_where_clips_cannot_be_written(run: Callable, films: Path, tmp_path: Path) -> None:
    place = ("--library-folder", tmp_path / "library")
    run("library", "add", films, *place)
    (tmp_path / "clips").write_text("a file")
    search = run("find", "--library", "the cyan triangle", *place, "--clips", tmp_path / "clips/deeper", "--json")
    assert search.code == 2 and search.data["found"] and search.data["clips"] == []
