"""/v1/video/export: moments of uploads in the formats of `keye.exports`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

import keye
from keye.exports import FORMATS
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.support.serving import error_of

MOMENTS = [{"start": 1.0, "end": 2.0, "probability": 0.97}, {"start": 2.5, "end": 3.0, "label": "the end", "note": "x"}]


def body_of(file_id: str, **more: Any) -> dict[str, Any]:
    return {"video": {"file_id": file_id}, "moments": MOMENTS, "label": "the red circle", "format": "csv", **more}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_a_file_to_save(http: TestClient, file_id: str, name: str) -> None:
    answer = http.post("/v1/video/export", json=body_of(file_id, format=name, rate="25", title="Zürich 1"))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(FORMATS[name].media_type)
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment") and disposition.endswith(f"Z%C3%BCrich%201{FORMATS[name].suffix}")
    assert isinstance(json.loads(answer.headers["keye-notes"]), list)
    assert float(answer.headers["keye-rounding-ms"]) <= 20
    assert "red circle" in answer.text and "the end" in answer.text


def test_the_place_of_the_video_stands_in_edit_lists(http: TestClient, file_id: str) -> None:
    for path, url in (
        ("/Users/ann/a b.mp4", "file:///Users/ann/a%20b.mp4"),
        ("C:\\video\\a.mp4", "file:///C:/video/a.mp4"),
        ("https://nas.example/a.mp4", "https://nas.example/a.mp4"),
    ):
        text = http.post("/v1/video/export", json=body_of(file_id, format="fcpxml", paths={"": path})).text
        assert url in text
    assert "short.mp4" in http.post("/v1/video/export", json=body_of(file_id, format="fcpxml")).text


def test_several_videos_in_one_file(http: TestClient, file_id: str) -> None:
    videos = {name: {"file_id": file_id} for name in ("a.mp4", "b.mp4")}
    moments = [{"start": 0.0, "end": 1.0, "file": name} for name in videos]
    body = {"videos": videos, "moments": moments, "format": "json", "label": "x"}
    answer = http.post("/v1/video/export", json=body)
    assert answer.status_code == 200 and [moment["file"] for moment in answer.json()["moments"]] == ["a.mp4", "b.mp4"]
    error_of(http.post("/v1/video/export", json={**body, "moments": [{"start": 0.0, "end": 1.0, "file": "c.mp4"}]}))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"format": "edll"}, "format"),
        ({"moments": []}, "moments"),
        ({"moments": [{"start": 1.0}]}, "moments[0].end"),
        ({"moments": [{"start": 1.0, "end": 2.0, "file": "c.mp4"}]}, None),
        ({"handles": [-1.0, 0.0]}, "handles[0]"),
        ({"rate": "fast"}, None),
        ({"start_timecode": "noon"}, None),
        ({"mode": "list"}, "mode"),
        ({"paths": {"": "a.mp4"}}, "paths"),
        ({"paths": {"": "file:///a b"}}, "paths"),
        ({"video": None}, None),
    ],
)
def test_what_is_rejected(http: TestClient, file_id: str, change: dict[str, Any], param: str | None) -> None:
    error = error_of(http.post("/v1/video/export", json=body_of(file_id, **change)))
    assert param is None or error["param"] == param


def test_files_of_another_key_are_not_found(model: keye.Keye, video: Any) -> None:
    keys = {"ann": "a-key-of-ann-0123456789", "bob": "a-key-of-bob-0123456789"}
    with TestClient(guarded_app(model, Settings(keys=keys)), base_url="http://127.0.0.1") as client:
        ann, bob = ({"Authorization": f"Bearer {key}"} for key in keys.values())
        form = {"files": {"file": ("a.mp4", video.read_bytes())}, "data": {"purpose": "media"}}
        mine = client.post("/v1/files", headers=ann, **form).json()["id"]
        assert client.post("/v1/video/export", json=body_of(mine), headers=ann).status_code == 200
        error_of(client.post("/v1/video/export", json=body_of(mine), headers=bob), 404)
