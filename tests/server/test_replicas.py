"""Several servers behind one: uploads are found where they are, questions meet what was computed, a replica may end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.slow
QUESTION = "at what times is the red circle shown?"


@pytest.fixture(scope="module", params=["processes", "ray"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`keye serve --replicas 2`, and its address."""
    command = [sys.executable, "-m", "keye", "serve", "nano", "--port", "0", "--threads", "1", "--replicas", "2"]
    if request.param == "ray":
        command += ["--ray", request.getfixturevalue("ray_address")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            result = next(
                (item for line in process.stdout if (item := re.search(r"^address +(http://\S+)", line))), None
            )
            assert result is not None
            yield result[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


@pytest.fixture
def http(server: tuple[str, Any]) -> Iterator[Any]:
    with httpx.Client(base_url=server[0], timeout=120) as client:
        yield client


def upload(http: Any, path: Path) -> str:
    answer = http.post("/v1/files", files={"file": (path.name, path.read_bytes())})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def ask(http: Any, *ids: str, **fields: Any) -> Any:
    content = [*({"type": "input_video", "file_id": item} for item in ids), {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}
    return http.post("/v1/chat/completions", json=body)


def replicas(pid: int) -> list[int]:
    """Processes of this server that have a model."""
    with_ray = [int(item.parent.name) for item in Path("/proc").glob("[0-9]*/cmdline") if is_actor(item)]
    return with_ray or [int(item.parent.name) for item in Path("/proc").glob("[0-9]*/stat") if parent_of(item) == pid]


def parent_of(stat: Path) -> int | None:
    """The parent of a process; None for one that has ended. (The kernel's list of children may leave some out while
    others end.)"""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def is_actor(command: Path) -> bool:
    try:
        return command.read_bytes().startswith(b"ray::ServeReplica:keye-")
    except OSError:  # it has ended meanwhile
        return False


def samples(http: Any, name: str) -> dict[str, float]:
    result = re.findall(rf'^{name}\{{replica="(\d)"\S* (\S+)$', http.get("/metrics").text, re.MULTILINE)
    return {replica: float(value) for replica, value in result}


def test_uploads_lie_apart_and_can_be_asked_about_together(http: Any, clips: list[Path]) -> None:
    ids = [upload(http, clip) for clip in clips[:2]]
    assert {item["id"] for item in http.get("/v1/files").json()["data"]} == set(ids)
    both = ask(http, *ids)
    assert both.status_code == 200, both.text
    assert len(both.json()["usage"]["media"]) == 2
    assert {item["id"] for item in http.get("/v1/files").json()["data"]} == set(ids)  # the copy is not listed
    for item in ids:
        assert http.delete(f"/v1/files/{item}").status_code == 200
    assert http.get("/v1/files").json()["data"] == []
    assert ask(http, ids[0]).status_code == 404


def test_questions_about_one_video_meet_its_cache(http: Any, clips: list[Path]) -> None:
    before = samples(http, "keye_prefix_cache_hits_total")
    item = upload(http, clips[2])
    cached = [ask(http, item).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(3)]
    assert cached[0] == 0 and min(cached[1:]) > 0
    after = samples(http, "keye_prefix_cache_hits_total")
    assert set(before) == set(after) == {"0", "1"}
    assert sorted(after[item] > before[item] for item in after) == [False, True]


def test_a_stream_is_passed_on_as_it_comes(http: Any, clips: list[Path]) -> None:
    item = upload(http, clips[3])
    content = [{"type": "input_video", "file_id": item}, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
    assert text == ask(http, item).json()["choices"][0]["message"]["content"]


def test_errors_are_those_of_a_replica(http: Any) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [], "nothing": 1})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/models").json()["data"][0]["id"] == "nano"
    assert http.get("/").status_code == 200


def test_a_killed_replica_is_restarted(http: Any, server: tuple[str, Any], clips: list[Path]) -> None:
    stored = [upload(http, clip) for clip in clips[:2]]  # one at each
    os.kill(replicas(server[1].pid)[0], signal.SIGKILL)
    # The other one goes on meanwhile, and what the victim kept is gone.
    assert http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                     ).status_code == 200  # fmt: skip
    assert sorted(ask(http, item).status_code for item in stored) == [200, 404]
    while http.get("/health").json()["replicas"] != {"0": True, "1": True}:
        pass
    assert ask(http, upload(http, clips[0])).status_code == 200


def test_a_replica_that_hangs_is_passed_over_and_started_again(http: Any, server: tuple[str, Any]) -> None:
    if is_ray(server[1].pid):
        pytest.skip("Ray Serve watches its replicas itself")
    (hung, _) = replicas(server[1].pid)
    os.kill(hung, signal.SIGSTOP)
    while all(http.get("/health").json()["replicas"].values()):
        pass
    for _ in range(4):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body, timeout=20).status_code == 200
    for path in ("/metrics", "/v1/files"):
        assert http.get(path, timeout=5).status_code == 200
    while http.get("/health").json()["replicas"] != {"0": True, "1": True}:
        pass
    assert hung not in replicas(server[1].pid)


def test_a_stream_whose_replica_is_killed_ends_with_an_error(http: Any, server: tuple[str, Any]) -> None:
    if is_ray(server[1].pid):
        pytest.skip("it is not known which actor answers")
    body = {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20_000, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for pid in replicas(server[1].pid):
            os.kill(pid, signal.SIGKILL)
        data = [line for line in lines if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]" and json.loads(data[-2][6:])["error"]["code"] == "replica_lost"
    while http.get("/health").status_code != 200 or http.get("/health").json()["replicas"] != {"0": True, "1": True}:
        pass


def is_ray(pid: int) -> bool:
    return b"--ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
