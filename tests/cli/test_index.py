"""`keye index`, and what the other commands make of the file it writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def indexed(model_folder: Path, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `video` for `model_folder`."""
    from keye.cli import main

    path = tmp_path_factory.mktemp("index") / "short.keye"
    assert main(["index", str(video), "-o", str(path), "--model", str(model_folder), "--json"]) == 0
    return path


def test_an_index_is_written_and_summarised_in_a_line(
    run: Callable, model_folder: Path, video: Path, tmp_path: Path
) -> None:
    arguments = ["index", video, "-o", tmp_path / "a.keye", "--model", model_folder, "--fps", 1, "--kv", "int8"]
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"wrote {tmp_path / 'a.keye'}: 4 frames · ") and "(64 visual) · int8 · " in result.out
    data = run(*arguments, "--json").data
    assert list(data) == ["path", "tokens", "media_tokens", "bytes", "kv", "plan", "seconds"]
    assert data["plan"]["timestamps"] == [0.0, 1.0, 2.5, 3.5]
    assert data["bytes"] == (tmp_path / "a.keye").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.keye"]


def test_it_takes_the_place_of_the_video(run: Callable, model_folder: Path, video: Path, indexed: Path) -> None:
    for command, words in (("ask", "what happens?"), ("ground", "the circle")):
        ours, theirs = (
            run(command, file, words, "--model", model_folder, "--max-tokens", 4, "--json").data
            for file in (indexed, video)
        )
        assert ours["usage"].pop("cached_tokens") > theirs["usage"].pop("cached_tokens") == 0
        assert {**ours, "seconds": None} == {**theirs, "seconds": None}
    result = run("ask", indexed, "what happens?", "--model", model_folder, "--max-tokens", 4)
    assert result.out.splitlines()[-1].startswith("8 frames · ")


def test_its_evidence_is_drawn_without_thumbnails(
    run: Callable, model_folder: Path, indexed: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "evidence.png"
    result = run("ask", indexed, "what?", "--model", model_folder, "--max-tokens", 2, "--evidence", picture)
    assert result.code == 0 and Image.open(picture).width == 1200


def test_inspect_and_check(run: Callable, indexed: Path, tmp_path: Path) -> None:
    displayed = run("inspect", indexed)
    assert displayed.code == 0
    lines = [" ".join(line.split()) for line in displayed.out.splitlines()]
    assert "model tiny, bfloat16, sparse attention" in lines
    assert "formats indexer_k bfloat16, k bfloat16, v bfloat16" in lines
    reserved = run("inspect", indexed, "--json").data
    assert (reserved["visual_tokens"], reserved["video"]["plan"]["name"]) == (128, "short.mp4")
    assert run("index", "--check", indexed).out.startswith(f"{indexed} is sound: ")
    assert run("index", "--check", indexed, "--json").data["sound"] is True
    broken = bytearray(indexed.read_bytes())
    broken[70_000] ^= 1
    (tmp_path / "broken.keye").write_bytes(broken)
    result = run("index", "--check", tmp_path / "broken.keye")
    assert result.code == 2 and "broken.keye is damaged" in result.err


def test_a_store_in_a_file_on_the_way(run: Callable, model_folder: Path, video: Path, tmp_path: Path) -> None:
    arguments = ["ask", video, "what?", "--model", model_folder, "--max-tokens", 4, "--json"]
    there = run(*arguments, "--kv-tier", "file", "--kv-folder", tmp_path).data
    assert there["text"] == run(*arguments).data["text"]
    result = run(*arguments, "--kv-folder", tmp_path)
    assert result.code == 2 and result.err == "keye: --kv-folder has no effect without --kv-tier file\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ask", "INDEX", "what?", "--fps", "1"], "short.keye is an index, .* leave --fps out"),
        (["ask", "INDEX", "what?", "--kv", "int4"], "short.keye is an index, .* leave --kv out"),
        (["ask", "VIDEO", "INDEX", "what?"], "can only be the first medium"),
        (["ask", "INDEX", "what?", "--attention", "dense"], "was indexed with sparse attention"),
        (["ask", "INDEX", "what?", "--dtype", "float32"], "load it with dtype bfloat16"),
        (["ask", "INDEX", "what?", "--draw", "x.png"], "ask about a single image"),
        (["ask", "INDEX", "what?", "--model", "nano"], "is an index of the model tiny, not of nano"),
        (["ground", "INDEX", "a circle", "--clips", "found"], "holds no frames: give the video itself for --clips"),
        (["live", "INDEX", "what?"], "is an index and holds no frames: give the video itself"),
        (["plan", "INDEX"], "computed already: keye inspect shows it"),
        (["index", "INDEX", "-o", "twice.keye"], "is an index already: give the video itself"),
        (["index", "VIDEO"], "name the index to write with -o"),
        (["index", "VIDEO", "-o", "none/x.keye"], "name a file in a folder that exists"),
        (["index", "VIDEO", "-o", "VIDEO"], "is the input itself: give -o another name"),
        (["index", "VIDEO", "--check"], "is not an index of a video"),
        (["index", "--check", "INDEX", "-o", "x.keye"], "leave -o out"),
    ],
)
def test_what_an_index_is_not_for(
    run: Callable, model_folder: Path, video: Path, indexed: Path, arguments: list[str], sentence: str
) -> None:
    named = [{"INDEX": str(indexed), "VIDEO": str(video)}.get(word, word) for word in arguments]
    own = [] if "--model" in named or "--check" in named else ["--model", str(model_folder)]
    result = run(*named, *own)
    assert result.code == 2 and result.err.count("\n") == 1
    assert re.search(sentence, result.err), result.err
    assert video.read_bytes()[4:8] == b"ftyp"


def test_evidence_of_an_index_is_drawn_without_pictures(
    run: Callable, indexed: Path, model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evidence.png"
    words = ["ask", indexed, "what happens?", "--model", model_folder, "--max-tokens", 4, "--evidence", path, "--json"]
    words += ["--temperature", 1, "--seed", 1]  # the likeliest tokens of this model are line breaks, an empty answer
    evidence = run(*words).data["evidence"]
    assert len(evidence["media"][0]["shares"]) == 8 and path.stat().st_size > 1000


def test_options_beside_an_index_are_for_the_other_video(
    run: Callable, model_folder: Path, indexed: Path, video: Path
) -> None:
    result = run("ask", indexed, video, "what?", "--model", model_folder, "--max-tokens", 2, "--nframes", 2, "--json")
    assert [len(plan["timestamps"]) for plan in result.data["plan"]][1] == 2
    assert f"--nframes has no effect on {indexed.name}, whose frames were chosen when it was made" in result.err


def test_the_old_name_of_an_option_names_the_new_one(run: Callable, tmp_path: Path) -> None:
    result = run("ask", "--index-kv", "int8", tmp_path / "a.mp4", "what?")
    assert result.code == 2 and "--indexer-kv" in result.err


def test_inspect_and_check_search_indexes(run: Callable, model_folder: Path, video: Path, tmp_path: Path) -> None:
    from keye import load
    from keye.engine.media import as_medium
    from keye.sessions.search.build import build_search_index

    path, model = tmp_path / "film.keye", load(model_folder)
    for _ in build_search_index(model.engine, as_medium(video), path, spacing=0.5, window_frames=4):
        pass
    lines = [" ".join(line.split()) for line in run("inspect", path).out.splitlines()]
    assert any(line.startswith("windows ") and "windows of a frame every 0.5 s" in line for line in lines)
    contents = run("inspect", path, "--json").data
    assert contents["complete"] and contents["unused_bytes"] == 0 and contents["formats"]["k"] == "int4"
    assert run("index", "--check", path, "--json").data["tokens"] == contents["tokens"] > 0
    assert "is sound" in run("index", "--check", path).out
    path.write_bytes(path.read_bytes() + bytes(5000))  # a run that was killed
    assert run("inspect", path, "--json").data["unused_bytes"] > 0
    result = run("ask", path, "what?", "--model", model_folder)
    assert result.code == 2 and "use keye find" in result.err
