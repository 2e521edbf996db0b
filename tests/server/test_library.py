"""/v1/library: folders are indexed beside requests, changes are streamed, videos are used by id like uploads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import keye
from keye.server import library as served_library
from keye.server.app import guarded_app
from keye.server.routes import library as routes
from keye.server.settings import Settings
from tests.support.serving import Running, error_of, read_events

KEY = {"Authorization": "Bearer a-key-of-ann-0123456789"}


@pytest.fixture(scope="module")
def films(video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "films"
    (folder / "deep").mkdir(parents=True)
    put(folder / "deep/short.mp4", video.read_bytes())
    put(folder / "broken.mp4", video.read_bytes()[:200])
    (folder / "deep/short.en.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\na red box\n")
    return folder.resolve()


def put(path: Path, data: bytes) -> None:
    """A file that was written long ago: one that is new may still be growing."""
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))


@pytest.fixture(scope="module")
def server(model: keye.Keye, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_library, "_SCAN_SECONDS", 0.05)
        patch.setattr(routes, "_POLL_SECONDS", 0.02)
        running = Running(model, Settings(library=tmp_path_factory.mktemp("catalog")))
        added = httpx.post(f"{running.url}/v1/library/folders", json={"path": str(films)}, timeout=30)
        assert added.status_code == 200 and added.json()["added"] == 2
        yield running
        running.stop()


def follow(server: Running, is_done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The videos by name, kept up to date from events until they are as they should be."""
    videos: dict[str, Any] = {}
    with httpx.stream("GET", f"{server.url}/v1/library/events", timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] == ("changed" if videos else "library") or not videos
            videos |= {video["id"]: video for video in event["videos"]}
            for removed in event.get("removed", ()):
                del videos[removed]
            by_name = {video["name"]: video for video in videos.values()}
            if is_done(by_name):
                return by_name
    raise AssertionError("the stream has ended")


@pytest.fixture(scope="module")
def indexed(server: Running) -> dict[str, Any]:
    ended = ("indexed", "failed")
    return follow(server, lambda videos: bool(videos) and all(v["state"] in ended for v in videos.values()))


def test_folders_are_indexed_and_what_cannot_be_read_is_named(server: Running, indexed: dict[str, Any]) -> None:
    good, bad = indexed["films/deep/short.mp4"], indexed["films/broken.mp4"]
    assert good["state"] == "indexed" and good["searchable"] == good["duration"] == 4.0 and good["bytes"] > 0
    assert bad["state"] == "failed" and "broken.mp4" in bad["reason"]
    complete = httpx.get(f"{server.url}/v1/library").json()
    assert [folder["name"] for folder in complete["folders"]] == ["films"] and complete["may_manage"]
    assert complete["bytes"] <= complete["limit"] and {video["id"] for video in complete["videos"]} == {
        good["id"],
        bad["id"],
    }
    assert httpx.get(f"{server.url}/v1/library/{good['id']}").json()["name"] == "films/deep/short.mp4"


def test_a_video_is_used_by_its_id_like_an_upload(server: Running, indexed: dict[str, Any], video: Path) -> None:
    name = indexed["films/deep/short.mp4"]["id"]
    piece = httpx.get(f"{server.url}/v1/library/{name}/content", headers={"Range": "bytes=4-7"})
    assert (piece.status_code, piece.content, piece.headers["content-type"]) == (206, b"ftyp", "video/mp4")
    for reference in ({"file_id": name}, {"library_id": int(name.partition("-")[2])}):
        pictures = httpx.post(f"{server.url}/v1/video/frames", json={"video": reference, "times": [1.0]}, timeout=60)
        assert pictures.json()["data"][0]["timestamp"] == 1.0
    lines = httpx.post(f"{server.url}/v1/video/subtitles", json={"video": {"file_id": name}}, timeout=60).json()
    assert lines["track"]["id"] == "short.en.srt" and lines["lines"][0]["text"] == "a red box"
    clip = httpx.post(f"{server.url}/v1/clips", json={"file_id": name, "intervals": [[0, 1]]}, timeout=60)
    assert clip.content[4:8] == b"ftyp"
    parts = [{"type": "file", "file": {"file_id": name}}, {"type": "text", "text": "what is seen?"}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    body = {"video": {"file_id": name}, "event": "the red circle", "subtitles": "none"}
    result = httpx.post(f"{server.url}/v1/video/find", json=body, timeout=60).json()["result"]
    assert result["coverage"]["unseen"] == []
    assert list(server.app.app.state.keye.files.folder.glob("find-*")) == [], "the index of the library was used"
    body |= {"preprocess_kwargs": {"video_end": 2.0}}
    httpx.post(f"{server.url}/v1/video/find", json=body, timeout=60).raise_for_status()
    assert len(list(server.app.app.state.keye.files.folder.glob("find-*"))) == 1, "an index of this part was made"


def test_all_videos_are_searched(server: Running, indexed: dict[str, Any]) -> None:
    body = {"event": "the red circle", "stream": True}
    events = read_events(httpx.post(f"{server.url}/v1/library/find", json=body, timeout=60))
    assert events[0]["type"] == "started" and events[-1]["type"] == "result" and events[-1]["id"] == events[0]["id"]
    result = events[-1]["result"]
    assert result["coverage"]["missing"][0]["name"] == "films/broken.mp4"
    known = {video["id"]: video["name"] for video in indexed.values()}
    for moment in (*result["moments"], *result["weaker"]):
        assert known[moment["file"]] == moment["name"] == "films/deep/short.mp4"
    alone = httpx.post(f"{server.url}/v1/library/find", json={"event": "the red circle"}, timeout=60).json()
    assert alone["result"]["query"] == "the red circle"


def test_a_new_video_appears_and_a_removed_folder_goes(
    server: Running, indexed: dict[str, Any], video: Path, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    assert httpx.post(f"{server.url}/v1/library/folders", json={"path": str(tmp_path / "more")}).status_code == 200
    put(tmp_path / "more/new.mp4", video.read_bytes())
    follow(server, lambda videos: videos.get("more/new.mp4", {}).get("state") == "indexed")
    path = str((tmp_path / "more").resolve())
    removed = httpx.delete(f"{server.url}/v1/library/folders", params={"path": path})
    assert removed.json()["deleted"] and removed.json()["freed_bytes"] > 0 and (tmp_path / "more/new.mp4").exists()
    follow(server, lambda videos: "more/new.mp4" not in videos)


def test_what_is_rejected(server: Running, http: TestClient, indexed: dict[str, Any], tmp_path: Path) -> None:
    for path in ("films", str(tmp_path / "absent"), ""):
        error_of(httpx.post(f"{server.url}/v1/library/folders", json={"path": path}))
    error_of(httpx.delete(f"{server.url}/v1/library/folders", params={"path": str(tmp_path)}))
    for name in ("library-9999", "library-x", "file-1", "..%2f"):
        assert httpx.get(f"{server.url}/v1/library/{name}/content").status_code in (400, 404)
    error_of(httpx.post(f"{server.url}/v1/library/find", json={"event": ""}))
    assert error_of(http.get("/v1/library"), 404)["code"] == "no_library"
    error_of(http.post("/v1/video/frames", json={"video": {"file_id": "library-1"}, "times": [0.0]}), 404)


def test_paths_are_hidden_from_those_who_may_not_manage(model: keye.Keye, films: Path, tmp_path: Path) -> None:
    """Names stand for folders and indexes in problems, reasons and errors."""
    library = served_library.ServedLibrary(model, tmp_path / "kept", may_manage=False)
    library.catalog.add_folder(films)
    library.problems = (f"{films}/deep cannot be read", f"the disk of {tmp_path / 'kept'} is full")
    good, bad = sorted(library.catalog.entries(), key=lambda entry: entry.path.name, reverse=True)
    library.catalog.update(bad, "failed", reason=f"{bad.path} is not a video")
    library.catalog.update(good, "indexed", searchable=4.0, duration=4.0)  # its index is gone
    described = library.describe()
    assert described["problems"] == ["films/deep cannot be read", "the disk of the library is full"]
    assert "films/broken.mp4 is not a video" in {entry["reason"] for entry in described["videos"]}
    with pytest.raises(keye.KeyeError, match="nothing in the library") as error:
        list(library.search("a dog", lambda search: None))
    texts = json.dumps(described) + str(error.value)
    assert str(films.parent) not in texts and str(tmp_path) not in texts
    library.close()


def test_clients_with_keys_search_and_do_not_manage(model: keye.Keye, films: Path, tmp_path: Path) -> None:
    settings = Settings(keys={"ann": KEY["Authorization"].removeprefix("Bearer ")}, library=tmp_path)
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1", headers=KEY) as client:
        answer = client.get("/v1/library").json()
        assert not answer["may_manage"] and answer["videos"] == []
        error = error_of(client.post("/v1/library/folders", json={"path": str(films)}), 403)
        assert error["code"] == "not_allowed"
        error_of(client.delete("/v1/library/folders", params={"path": str(films)}), 403)
        error_of(client.post("/v1/library/retry", json={}), 403)
        assert "nothing in the library" in error_of(client.post("/v1/library/find", json={"event": "x"}))["message"]
