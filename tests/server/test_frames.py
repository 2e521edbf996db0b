"""/v1/video/frames and /v1/video/subtitles: what is shown beside answers, of one's own files only."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import keye
from keye.media.plan import VideoPlan
from keye.media.source.fetch import fetch_source, untrusted
from keye.media.speech import Transcriber
from keye.media.thumbnails import ThumbnailCache, make_thumbnails
from keye.media.video import VideoReader
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.media.test_speech import Service
from tests.media.test_speech import service as service
from tests.media.test_speech import talk as talk
from tests.server.conftest import upload
from tests.support.serving import error_of, read_events

SRT = "1\n00:00:00,500 --> 00:00:01,000\na red box\n\n2\n00:00:02,000 --> 00:00:03,000\nthe end\n"


def pictures(answer: Any) -> list[tuple[float, Image.Image]]:
    assert answer.status_code == 200, answer.text
    listed = answer.json()["data"]
    head = "data:image/jpeg;base64,"
    assert all(item["url"].startswith(head) for item in listed)
    read = [Image.open(io.BytesIO(base64.b64decode(item["url"].removeprefix(head)))) for item in listed]
    assert [picture.size for picture in read] == [(item["width"], item["height"]) for item in listed]
    return [(item["timestamp"], picture) for item, picture in zip(listed, read, strict=True)]


def test_frames_come_in_the_order_of_their_times(http: TestClient, file_id: str, video: Path) -> None:
    """Each time gets the frame on display then; one outside the video the nearest."""
    body = {"video": {"file_id": file_id}, "times": [2.2, 0.0, 2.2, 100.0], "height": 48}
    read = pictures(http.post("/v1/video/frames", json=body))
    assert [time for time, _ in read] == [2.0, 0.0, 2.0, 3.5] and read[0][1].size == (48, 48)
    assert read[0][1].tobytes() == read[2][1].tobytes() != read[1][1].tobytes()
    data = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    for part in ({"url": data}, {"type": "video_url", "video_url": {"url": data}},
                 {"type": "file", "file": {"file_id": file_id}}):  # fmt: skip
        again = pictures(http.post("/v1/video/frames", json={**body, "video": part}))
        assert [(time, picture.tobytes()) for time, picture in again] == [(t, p.tobytes()) for t, p in read]
    large = pictures(http.post("/v1/video/frames", json={**body, "height": 480}))
    assert large[0][1].size == (112, 112), "pictures are not made larger than the video"


def test_frames_that_were_made_are_kept_by_owner(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    frames = VideoReader.frames

    def counted(reader: VideoReader, plan: VideoPlan) -> Iterator[Any]:
        opened.append(plan.frames)
        return frames(reader, plan)

    monkeypatch.setattr(VideoReader, "frames", counted)
    source, cache = untrusted(fetch_source(video)), ThumbnailCache()
    first = make_thumbnails(source, [0, 1], 48, salt=b"ann", cache=cache)
    assert make_thumbnails(source, [1, 0, 1], 48, salt=b"ann", cache=cache) == [first[1], first[0], first[1]]
    assert opened == [2]
    assert make_thumbnails(source, [0, 1], 48, salt=b"bob", cache=cache) == first and opened == [2, 2]
    small = ThumbnailCache(most_bytes=len(first[0].jpeg) + 1)
    make_thumbnails(source, [0, 1], 48, salt=b"ann", cache=small)
    make_thumbnails(source, [0, 1], 48, salt=b"ann", cache=small)
    assert len(opened) > 3, "the least used picture made room"
    cache.close()
    small.close()


def test_keys_stand_for_times_nearby(tmp_path: Path) -> None:
    """Frames 0.1 s apart, keys each second: only keys are decoded where times lie far apart, and none twice."""
    with av.open(str(tmp_path / "keys.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "sc_threshold": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(40):
            picture = np.full((64, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    source, cache = untrusted(fetch_source(tmp_path / "keys.mp4")), ThumbnailCache()
    with VideoReader(source) as reader:
        assert reader.starts() == [0, 10, 20, 30]

    def stamps(times: list[float], near: bool) -> list[float]:
        return [round(picture.timestamp, 3) for picture in make_thumbnails(source, times, 48, cache=cache, near=near)]

    assert stamps([0.4, 1.6, 2.9], near=True) == [0.0, 2.0, 3.0]
    assert stamps([0.4, 1.6, 2.9], near=False) == [0.4, 1.6, 2.9]
    assert stamps([0.4, 0.5, 2.0], near=True) == [0.4, 0.5, 2.0] and stamps([0.4], near=True) == [0.4]
    cache.close()


def test_a_video_that_was_opened_stays_open_for_a_while(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pictures of it come from the same reader; one that has ended is replaced."""
    source, cache = untrusted(fetch_source(video)), ThumbnailCache()
    first = make_thumbnails(source, [0], 48, cache=cache)
    begun: list[object] = []
    begin = VideoReader.__init__

    def counted(reader: VideoReader, *arguments: Any, **options: Any) -> None:
        begun.append(reader)
        begin(reader, *arguments, **options)

    monkeypatch.setattr(VideoReader, "__init__", counted)
    assert make_thumbnails(source, [1], 48, cache=cache) != first and begun == []
    (reader,) = (entry for entry, _ in cache._readers.values())  # private: the worker must end from outside
    reader.stop()
    assert make_thumbnails(source, [0], 40, cache=cache)[0].height == 40 and len(begun) == 1
    cache.close()
    make_thumbnails(source, [0], 32, cache=cache)
    assert len(begun) == 2
    cache.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"times": []}, "times"),
        ({"times": [0.0] * 61}, "times"),
        ({"times": [-1.0]}, "times[0]"),
        ({"height": 481}, "height"),
        ({"height": 1}, "height"),
        ({"video": {"type": "text", "text": "hello"}}, "video"),
        ({"video": {"file_id": "/etc/passwd"}}, None),
        ({"video": {"url": "file:///etc/passwd"}}, None),
        ({"video": {"type": "video", "video": ["data:image/png;base64,AAAA"]}}, None),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_requests_for_frames_that_are_rejected(
    http: TestClient, file_id: str, change: dict[str, Any], param: str | None
) -> None:
    error = error_of(http.post("/v1/video/frames", json={"video": {"file_id": file_id}, "times": [0.0], **change}))
    assert param is None or error["param"] == param


def test_the_text_of_a_subtitle_file_becomes_lines(http: TestClient, file_id: str) -> None:
    expected = [{"start": 0.5, "end": 1.0, "text": "a red box"}, {"start": 2.0, "end": 3.0, "text": "the end"}]
    for body in ({"subtitles": {"text": SRT}}, {"video": {"file_id": file_id}, "subtitles": {"text": SRT}}):
        answer = http.post("/v1/video/subtitles", json=body).json()
        assert answer["lines"] == expected and answer["tracks"] == []
    empty = http.post("/v1/video/subtitles", json={"video": {"file_id": file_id}}).json()
    assert (empty["track"], empty["lines"]) == (None, [])


def test_a_text_track_of_an_upload_is_listed_and_read(http: TestClient, tmp_path: Path) -> None:
    from tests.media.test_subtitles import LINES, write_video

    video = upload(http, write_video(tmp_path / "talk.mkv", LINES))["id"]
    answer = http.post("/v1/video/subtitles", json={"video": {"file_id": video}}).json()
    assert [(track["id"], track["language"]) for track in answer["tracks"]] == [("1", "de")]
    assert [line["text"] for line in answer["lines"]] == ["erste Zeile", "zweite"] and answer["track"]["id"] == "1"
    body = {"video": {"file_id": video}, "subtitles": {"track": "fr"}}
    assert "has no subtitles" in error_of(http.post("/v1/video/subtitles", json=body))["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"subtitles": {"track": "1"}},
        {"subtitles": {"track": "1", "text": "x"}},
        {"subtitles": {}},
        {"subtitles": {"text": "no subtitles at all"}},
    ],
)
def test_requests_for_subtitles_that_are_rejected(http: TestClient, body: dict[str, Any]) -> None:
    error_of(http.post("/v1/video/subtitles", json=body))


def test_no_path_is_opened_as_a_track(http: TestClient, file_id: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.srt"
    secret.write_text(SRT)
    for track in (str(secret), f"file://{secret}", "../secret.srt"):
        error_of(http.post("/v1/video/subtitles", json={"video": {"file_id": file_id}, "subtitles": {"track": track}}))


def test_speech_is_transcribed_once_where_a_service_is_named(model: keye.Keye, talk: Path, service: Service) -> None:
    service.segments((0.0, 1.0, "hello"))
    settings = Settings(transcriber=Transcriber(service.url, key="secret"))
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1") as client:
        body = {"video": {"file_id": upload(client, talk)["id"]}, "subtitles": "speech"}
        events = read_events(client.post("/v1/video/subtitles", json={**body, "stream": True}))
        assert events[0]["type"] == "started" and events[-1]["type"] == "result"
        answer = client.post("/v1/video/subtitles", json=body).json()
        assert answer == events[-1]["result"] and answer["track"]["origin"] == "speech"
        assert answer["lines"] == [{"start": 0.0, "end": 1.0, "text": "hello"}] and len(service.received) == 1


def test_no_speech_is_sent_without_a_service(http: TestClient, file_id: str) -> None:
    for path in ("find", "subtitles"):
        body = {"video": {"file_id": file_id}, "subtitles": "speech", **({"event": "x"} if path == "find" else {})}
        assert error_of(http.post(f"/v1/video/{path}", json=body))["code"] == "no_transcriber"


def test_files_of_another_key_are_not_found(model: keye.Keye, video: Path) -> None:
    keys = {"ann": "a-key-of-ann-0123456789", "bob": "a-key-of-bob-0123456789"}
    with TestClient(guarded_app(model, Settings(keys=keys)), base_url="http://127.0.0.1") as client:
        ann, bob = ({"Authorization": f"Bearer {key}"} for key in keys.values())
        form = {"files": {"file": ("a.mp4", video.read_bytes())}, "data": {"purpose": "media"}}
        mine = client.post("/v1/files", headers=ann, **form).json()["id"]
        for path, body in (("frames", {"times": [0.0]}), ("subtitles", {})):
            complete = {"video": {"file_id": mine}, **body}
            assert client.post(f"/v1/video/{path}", json=complete, headers=ann).status_code == 200
            error_of(client.post(f"/v1/video/{path}", json=complete, headers=bob), 404)


def test_models_say_what_they_know_and_can(http: TestClient) -> None:
    (entry,) = http.get("/v1/models").json()["data"]
    facts = entry["keye"]
    assert facts["scope"]["short"] == "drawn shapes only" and facts["measured_frames"] == facts["scope"]["frames"] == 64
    assert {"video", "find", "frames", "subtitles"} <= set(facts["capabilities"])
    known = {item["name"]: item for item in facts["known_models"]}
    assert set(known) == {"preview", "1.5", "2.0", "671b"}
    assert known["2.0"]["bytes"] > known["1.5"]["bytes"] > 10**9 and not known["671b"]["fits"]


def test_scenes_are_the_parts_between_cuts(http: TestClient, tmp_path: Path) -> None:
    shots = np.repeat([[255, 0, 0], [0, 0, 255], [255, 255, 255]], [12, 10, 8], axis=0).astype(np.uint8)
    with av.open(str(tmp_path / "shots.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for color in shots:
            picture = np.full((64, 64, 3), color)
            picture[:32, :32] = 255 - color  # a picture of one colour is taken for a fade
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    body = {"video": {"file_id": upload(http, tmp_path / "shots.mp4")["id"]}}
    events = read_events(http.post("/v1/video/scenes", json={**body, "stream": True}))
    assert events[0]["type"] == "started" and events[-1]["type"] == "result"
    result = http.post("/v1/video/scenes", json=body).json()
    assert result == events[-1]["result"] and result["cuts"] == pytest.approx([1.2, 2.2])
    assert [scene["start"] for scene in result["scenes"]] == pytest.approx([0.0, 1.2, 2.2])
    error_of(http.post("/v1/video/scenes", json={**body, "min_length": -1}))
    error_of(http.post("/v1/video/scenes", json={"video": {"file_id": "file-none"}}), 404)
