"""`keye batch`: questions of a file, answered by an engine in this process and by a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")


@pytest.fixture
def manifest(tmp_path: Path, video: Path) -> Path:
    """Three questions about one video, one about a file that is missing, one line that is none."""
    lines = [{"id": name, "video": str(video), "question": "what?", "max_tokens": 2} for name in "abc"]
    lines.append({"id": "missing", "video": "nothing.mp4", "question": "what?"})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken\n")
    return path


def records(out: Path) -> dict[str, Any]:
    return {record["id"]: record for record in map(json.loads, out.read_text().splitlines())}


def test_answers_and_errors(run: Callable, model_folder: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("batch", manifest, "-o", out, "--model", model_folder, "--json", "--max-frames", 4)
    report, matches = result.data, records(out)
    assert result.code == 2 and "2 of 5 items have an error in" in result.err
    assert (report["items"], report["ok"], report["errors"], report["completion_tokens"]) == (5, 3, 2, 6)
    assert report["video_seconds"] == 12.0
    assert set(matches) == {"a", "b", "c", "missing", "line-5"}
    assert len(matches["a"]["usage"]["media"][0]["timestamps"]) == 4
    assert matches["missing"]["error"]["message"].endswith("nothing.mp4 does not exist; check the path")
    # The second and third question met what the first one had computed.
    cached = [matches[name]["usage"]["prompt_tokens_details"]["cached_tokens"] for name in "abc"]
    assert cached[0] == 0 and min(cached[1:]) > 0


def test_the_same_command_goes_on(run: Callable, model_folder: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["batch", manifest, "-o", out, "--model", model_folder]
    text = run(*command).out
    assert text.startswith("3 answers and 2 errors in ")
    first, *others = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(first + others[0][:20])
    assert run(*command, "--json").data["skipped"] == 1
    assert len(records(out)) == 5 and out.read_bytes().startswith(first)
    before = out.read_bytes()
    assert run(*command).out == f"nothing was left to do: {out} holds all 5 items\n"
    assert out.read_bytes() == before
    result = run(*command, "--max-tokens", 3, "--fps", 1)
    assert result.code == 2 and "as the manifest or the options were before" in result.err
    assert out.read_bytes() == before


def test_a_corrected_line_is_asked(run: Callable, model_folder: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = ["batch", manifest, "-o", out, "--model", model_folder]
    run(*command)
    lines = manifest.read_text().splitlines()
    lines[3:] = [lines[0].replace('"a"', '"missing"'), lines[0].replace('"a"', '"line-5"')]
    manifest.write_text("\n".join(lines))
    result = run(*command, "--json")
    assert (result.code, result.data["skipped"], result.data["ok"]) == (0, 3, 2)
    assert all(record["error"] is None for record in records(out).values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--server", "http://127.0.0.1:9", "--workers", "2"], "give one of them"),
        (["--server", "http://127.0.0.1:9", "--kv", "int8"], "--kv cannot be set with --server"),
        (["--server", "nowhere"], "'nowhere' is not the address of a server"),
        (["--server", "http://127.0.0.1:9", "--tries", "1"], "http://127.0.0.1:9 cannot be reached"),
        (["--model", "/nothing/here"], "/nothing/here"),
    ],
)
def test_workers_that_cannot_be(
    run: Callable, manifest: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = run("batch", manifest, "-o", tmp_path / "out.jsonl", *arguments)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") <= 3


def test_the_output_is_never_the_manifest(run: Callable, manifest: Path) -> None:
    before = manifest.read_text()
    result = run("batch", manifest, "-o", manifest)
    assert result.code == 2 and result.err.startswith("keye: ")
    assert manifest.read_text() == before


def test_a_cluster_that_is_not_there(run: Callable, manifest: Path, tmp_path: Path) -> None:
    result = run("batch", manifest, "-o", tmp_path / "out.jsonl", "--ray", "127.0.0.1:9")
    assert result.code == 2
    assert "no Ray cluster can be reached at 127.0.0.1:9" in result.err or "ray is not installed" in result.err


def test_engines_share_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from keye.commands.shared.inputs import shares

    options = {"device": "cuda", "threads": None, "memory": None}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr("keye.cache.slabs.free_memory", lambda device: 8 << 30)
    assert shares(options, 3) == [
        {"device": "cuda:0", "threads": 2, "memory": 4 << 30},
        {"device": "cuda:1", "threads": 2, "memory": 8 << 30},
        {"device": "cuda:0", "threads": 2, "memory": 4 << 30},
    ]
    assert shares({"device": "cpu", "threads": 3, "memory": 1 << 30}, 1) == [
        {"device": "cpu", "threads": 3, "memory": 1 << 30}
    ]


def test_lines_that_json_can_write_but_readers_reject(
    run: Callable, model_folder: Path, video: Path, tmp_path: Path
) -> None:
    deep = '{"items":' * 300 + "{}" + "}" * 300
    lines = (
        f'{{"video": "{video}", "question": "x", "schema": {deep}}}',
        f'{{"video": "{video}", "question": "\\ud800"}}',
    )
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    run("batch", tmp_path / "m.jsonl", "-o", tmp_path / "out.jsonl", "--model", model_folder)
    matches = [record["error"]["message"] for record in records(tmp_path / "out.jsonl").values()]
    assert sorted(matches) == [
        "the body has half of a surrogate pair; send whole characters",
        "the body is nested too deeply; send fewer levels",
    ]
