"""`keye eval TASK...` and its verbs, against a small server and with an engine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keye.commands.eval.group import VERBS
from keye.evals.task import list_tasks
from tests.evals.fake_task import write_data

TASK = f"{Path(__file__).parents[1] / 'evals/fake_task.py'}:TASK"


class Letters(ThreadingHTTPServer):
    """Answers A, B, C, D by the number of the question; `fails` says which requests it rejects."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fails: Callable[[int], bool] = lambda number: False
        self.keys: list[str | None] = []
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Letters

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "letters-1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.bodies.append(body)
        text = body["messages"][0]["content"][-1]["text"]
        number = int(text.rpartition("(q")[2][:-1])
        if self.server.fails(number):
            self._send(400, {"error": {"message": "out of order"}})
        else:
            self._send(200, {"choices": [{"message": {"content": "ABCD"[number % 4]}}], "model": "letters-1"})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Letters]:
    letters = Letters()
    threading.Thread(target=letters.serve_forever, args=(0.01,), daemon=True).start()
    yield letters
    letters.shutdown()
    letters.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", 20)


def test_a_run_on_a_server(run, server: Letters, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LETTERS_KEY", "secret")
    words = ["eval", TASK, "--data", data, "--server", server.url, "--key", "LETTERS_KEY", "-o", tmp_path / "out"]
    result = run(*words, "--frames", 4, "--format", "lmms-eval")
    assert result.code == 0 and set(server.keys) == {"Bearer secret"} and len(server.bodies) == 20
    assert "letters" in result.out and "100.00" in result.out and "20 items in 4 clusters" in result.out
    video = server.bodies[0]["messages"][0]["content"][0]["video_url"]
    assert video["url"].startswith("data:video/mp4;base64,") and video["nframes"] == 4
    folder = tmp_path / "out" / "letters"
    assert {path.name for path in folder.iterdir()} == {
        "predictions.jsonl", "result.json", "run.json", "samples.jsonl", "scores.jsonl"
    }  # fmt: skip
    assert "Letters" in (tmp_path / "out" / "report.html").read_text()
    again = run(*words, "--frames", 4, "--json").data["results"][0]
    assert again["model"] == {"name": "letters-1", "engine": {}, "server": server.url} and again["asked"] == 0
    assert "secret" not in "".join(path.read_text() for path in folder.iterdir())
    changed = run(*words, "--frames", 5)
    assert changed.code == 2 and "choose another folder with -o" in changed.err


def test_a_server_that_fails_half_of_its_requests(run, server: Letters, data: Path, tmp_path: Path) -> None:
    server.fails = lambda number: number % 2 == 0
    words = ["eval", TASK, "--data", data, "--server", server.url, "-o", tmp_path / "out"]
    result = run(*words)
    assert result.code == 2 and ">= 50.00" in result.out and "no score: of 20 items 10 failed" in result.out
    assert "10 items: out of order" in result.err
    assert "the same command asks only what failed or is missing" in result.err
    server.fails = lambda number: False
    result = run(*words, "--json")
    assert result.code == 0 and result.data["results"][0]["scorers"]["strict"]["value"] == 100.0
    assert len(server.bodies) == 30


def test_mistakes_are_one_sentence(run, server: Letters, data: Path, tmp_path: Path) -> None:
    words = ["eval", TASK, "--data", data, "-o", tmp_path / "out"]
    assert "'NO_SUCH_KEY' is not set" in run(*words, "--server", server.url, "--key", "NO_SUCH_KEY").err
    assert "--key is for servers" in run(*words, "--key", "PATH").err
    assert "name its server with --judge" in run(*words, "--judge-model", "x").err
    assert "'tinelens' is not a task" in run("eval", "tinelens", "-o", tmp_path).err
    (data / "2.mp4").unlink()
    result = run(*words, "--server", server.url)
    assert result.code == 2 and "give --allow-missing to count those items as failed" in result.err
    assert server.bodies == [] and not (tmp_path / "out").exists()


def test_a_run_with_an_engine(run, model_folder: Path, video: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 4, videos=2)
    for number in range(2):
        shutil.copy(video, data / f"{number}.mp4")
    words = ["eval", TASK, "--data", data, "-o", tmp_path / "out", "--model", model_folder]
    result = run(*words, "--max-tokens", 3, "--max-frames", 4, "--concurrency", 2, "--json")
    assert result.code == 0, result.err
    (figures,) = result.data["results"]
    assert figures["complete"] and figures["frames"]["max"] == 4 and len(figures["digests"]["weights"]) == 16
    assert figures["cached_tokens"] > 0, "the second question about a video reuses it"


def test_compare(run, server: Letters, data: Path, tmp_path: Path) -> None:
    words = ["eval", TASK, "--data", data, "--server", server.url, "-o"]
    run(*words, tmp_path / "a")
    server.fails = lambda number: number == 3
    run(*words, tmp_path / "b")
    result = run("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert result.code == 0 and "20 items in both results" in result.out and "-5.00" in result.out
    (comparison,) = run("eval", "compare", tmp_path / "a", tmp_path / "b", "--json").data["comparisons"]
    assert comparison["scorers"]["strict"]["first_better_items"] == ["q3"]
    assert "has no results" in run("eval", "compare", tmp_path / "a", data).err


def test_rescore(run, tmp_path: Path) -> None:
    rows = [{"id": str(number), "prediction": "AB"[number % 2], "answer": "A"} for number in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("eval", "rescore", tmp_path / "p.jsonl", "--task", TASK, "--scorer", "strict", "--json")
    assert result.code == 0 and result.data["scorers"]["strict"]["value"] == 50.0
    assert run("eval", "rescore", tmp_path / "p.jsonl", "--task", TASK, "--scorer", "x").code == 2


def test_list_and_prepare(run, data: Path, video: Path) -> None:
    rows = run("eval", "list", "--data", data, "--json").data["tasks"]
    assert {row["name"] for row in rows} == {task.name for task in list_tasks()}
    assert all(row["data"] and row["licence"] for row in rows)
    lines = run("eval", "list", "--data", data).out.splitlines()
    assert len(lines) == 1 + len(rows) and max(map(len, lines)) <= 80
    assert "licence: BSD-3" in run("eval", "list", "timelens", "--data", data).out
    result = run("eval", "prepare", TASK, "--from", data)
    assert result.code == 2 and "does not decode" in result.out and "0.mp4" in result.out
    for number in range(4):
        shutil.copy(video, data / f"{number}.mp4")
    assert run("eval", "prepare", TASK, "--from", data).code == 0


def test_no_task_has_the_name_of_a_verb() -> None:
    assert not {task.name for task in list_tasks()} & set(VERBS)
