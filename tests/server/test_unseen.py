"""A clip of which no frame is sampled is refused, never answered: every answer rests on at least one frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import keye
from tests.support.clips import write_sound
from tests.support.serving import error_of

#: Parts of a video of four seconds: between two frames, without length, the last of it, beyond it, all of it.
PARTS: list[dict[str, Any]] = [
    {"video_start": 0.6, "video_end": 0.7}, {"video_start": 1.0, "video_end": 1.0}, {"video_start": 3.99},
    {"video_start": 4.0}, {"video_start": 9.0, "video_end": 10.0}, {"video_end": 0.01}, {"nframes": 1}, {},
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("verb", ["ask", "ground"])
def test_answers_rest_on_frames(model: keye.Keye, video: Path, verb: str, part: dict[str, Any]) -> None:
    def answer() -> keye.Answer:
        return getattr(model, verb)(video, "the red circle", media_options=part, max_tokens=1)

    if part.get("video_start", 0) >= 4:
        with pytest.raises(keye.KeyeError, match="lies after the end of the video"):
            answer()
    else:
        reply = answer()
        assert len(reply.plan[0]["timestamps"]) >= 1 and reply.usage.media_tokens > 0


def test_nothing_to_look_at_is_refused(model: keye.Keye, video: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.mp4")
    for verb in (model.ask, model.ground, model.find):
        with pytest.raises(keye.KeyeError, match="has no video stream"):
            verb(sound, "the red circle")
    with pytest.raises(keye.KeyeError, match="frames"):
        model.ask(keye.Frames([]), "what?")


def test_the_server_refuses(http: TestClient, file_id: str, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    upload = http.post("/v1/files", files={"file": ("sound.mp4", sound)}, data={"purpose": "media"})
    assert "no video stream" in error_of(upload)["message"]
    body = {
        "video": {"type": "video_url", "video_url": {"url": file_id, "video_start": 9.0}},
        "event": "the red circle",
        "max_tokens": 1,
    }
    assert "lies after the end of the video" in error_of(http.post("/v1/video/ground", json=body))["message"]
