"""`keye find` and `keye ask --search` by the packaged model on a short film."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from keye.sessions.search.find import MomentSearch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_moment_is_found_and_cut(run: Callable, film: Path, film_index: Path, tmp_path: Path) -> None:
    result = run("find", film, "the red circle", "--index", film_index, "--clips", tmp_path / "clips",
                 "--export", tmp_path / "moments.csv", "--record", tmp_path / "record.html")  # fmt: skip
    assert result.code == 0
    assert re.search(r"  21\.0 s to 23\.0 s  \(2\.0 s\)( · [0-9]+%)? · confirmed", result.out)
    assert "a frame at least every 1 s" in result.out and "looked at closely" in result.out
    assert (tmp_path / "clips/film-001-21.0s-23.0s.mp4").exists()
    assert "the red circle" in (tmp_path / "moments.csv").read_text()
    assert "is there a red circle in the video?" in (tmp_path / "record.html").read_text()
    assert "looking closely" in result.err and "21.0 s to 23.0 s" in result.err


def test_json_is_the_result(run: Callable, film: Path, film_index: Path) -> None:
    data = run("find", film, "the green square", "--index", film_index, "--json").data
    assert data["found"] is False and data["moments"] == [] and data["clips"] == []
    assert data["coverage"]["share"] == 1.0 and data["query"] == "the green square"


def test_nothing_found_exits_with_0(run: Callable, film: Path, film_index: Path) -> None:
    result = run("find", film, "the green square", "--index", film_index)
    assert result.code == 0 and result.out.startswith("Not found: the green square")


def test_unreadable_files_of_a_folder_are_named(run: Callable, film: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(film, folder / "more" / "good.mp4")
    (folder / "bad.mp4").write_bytes(b"no video at all" * 100)
    data = run("find", folder, "the red circle", "--effort", "medium", "--no-scenes", "--json").data
    assert [moment["file"] for moment in data["moments"]] == [str(folder / "more" / "good.mp4")]
    assert (data["moments"][0]["start"], data["moments"][0]["rank"]) == (21.0, 1)
    assert [entry["file"] for entry in data["failed"]] == [str(folder / "bad.mp4")]
    assert "bad.mp4" in data["failed"][0]["error"]


def test_interrupting_prints_the_best_so_far(
    run: Callable, film: Path, film_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: MomentSearch) -> None:
        if self.scored:
            raise KeyboardInterrupt

    monkeypatch.setattr(MomentSearch, "_check", interrupt)
    result = run("find", film, "the red circle", "--index", film_index, "--json")
    assert result.code == 130 and result.data["stopped"] is True
    assert "stopped" in {note["code"] for note in result.data["notes"]}


def test_words_outside_the_scope_are_noted_once(run: Callable, film: Path, film_index: Path) -> None:
    arguments = ["find", film, "the red dog", "--index", film_index, "--budget", 100]
    assert run(*arguments).err.count("the model does not know 'dog'") == 1
    assert "does not know" not in run(*arguments, "--no-scope-notes").err


def test_asking_about_the_part_that_was_found(run: Callable, film: Path) -> None:
    result = run("ask", film, "what color is the circle?", "--search", "the red circle", "--json")
    assert result.data["text"] == "red" and result.data["moment"]["start"] == 21.0
    assert result.data["plan"][0]["part"] == [20.0, 24.0]
    missing = run("ask", film, "what color is it?", "--search", "the green square", "--json")
    assert missing.code == 0 and missing.data == {"search": "the green square", "found": False}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["find"], "give a video and an event, as in: keye find"),
        (["find", "the red circle"], "there is nothing to search: put a video before the event"),
        (["find", "{film}"], "is a file: put the event after the files"),
        (["find", "{film}", "{again}", "x", "--index", "i.keye"], "--index keeps the index of one video, but 2"),
        (["find", "{film}", "{again}", "x", "--record", "r.html"], "--record writes the record of one video, but 2"),
        (["find", "{film}", ""], "the event is empty"),
        (["ask", "{film}", "what?", "--search", "x", "--fps", "2"], "--search chooses frames itself: leave --fps out"),
        (["ask", "{film}", "{film}", "what?", "--search", "x"], "--search finds the part of one video"),
    ],
)
def test_mistakes_get_one_sentence(run: Callable, film: Path, arguments: list[str], sentence: str) -> None:
    names = {"{film}": str(film), "{again}": f"{film.parent}/./{film.name}"}
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1


def test_a_search_index_stands_for_its_video_in_exports(run: Callable, film_index: Path, tmp_path: Path) -> None:
    # The folder holds no model: what cannot be exported fails before one is loaded.
    words = ["find", film_index, "the red circle", "--model", tmp_path, "--export"]
    assert "is an index" not in run(*words, tmp_path / "cut.edl").err
    assert "is the input itself" not in run(*words, tmp_path / "cut.edl", "--record", tmp_path / "r.html").err
