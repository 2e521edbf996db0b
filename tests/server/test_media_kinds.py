"""Images, animations and files that are neither, in every place where a client may put one."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.support.serving import Ask, error_of

PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (120, 60), (200, 10, 10))).save(out)
    return out.getvalue()


def animation(kind: str = "WEBP") -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (60 * i, 0, 90)) for i in range(4)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=500)
    return out.getvalue()


def upload(http: TestClient, name: str, data: bytes) -> Any:
    return http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "media"})


def test_a_heic_photo_everywhere(http: TestClient, ask: Ask) -> None:
    stored = upload(http, "photo.heic", heic()).json()
    assert stored["keye"] == {"kind": "image", "width": 120, "height": 60, "notes": []}
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(heic(), "image/heic")}},
        {"type": "input_image", "image_url": data_url(heic(), "application/octet-stream")},
        {"type": "input_file", "file_id": stored["id"]},
        {"type": "input_file", "filename": "photo.heic", "file_data": base64.b64encode(heic()).decode()},
    ]
    tokens = {ask([part, {"type": "text", "text": "what?"}])["usage"]["prompt_tokens"] for part in parts}
    assert len(tokens) == 1
    wrong = {"type": "video_url", "video_url": {"url": data_url(heic(), "video/mp4")}}
    error = error_of(http.post("/v1/chat/completions", json=chat(wrong)))
    assert error["message"] == "<data URL> is an image; send it as image_url"


def chat(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}], "max_tokens": 1}


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_an_animation_is_a_video_or_by_request_its_first_picture(kind: str, http: TestClient, ask: Ask) -> None:
    url = data_url(animation(kind), f"image/{kind.lower()}")
    stored = upload(http, "a", animation(kind)).json()["keye"]
    assert (stored["kind"], stored["frames"], stored["duration"]) == ("video", 4, 2.0)
    for part in ({"type": "video_url", "video_url": {"url": url}}, {"type": "input_file", "file_data": url}):
        plan = http.post("/v1/media/plan", json={"content": [part]}).json()["media"][0]
        assert (plan["frames"] > 1, plan["duration"]) == (True, 2.0)
    complete = ask([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}])
    note = "<data URL>: it moves, and as an image only its first picture is used; give it as a video for all of it"
    assert complete["keye"]["notes"] == [note]


def test_a_pdf_gets_one_sentence_everywhere(http: TestClient) -> None:
    message = "is a PDF document, which is not read; convert its pages to PNG and give those as images"
    assert error_of(upload(http, "scan.pdf", PDF))["message"] == f"scan.pdf {message}"
    for part in (
        {"type": "image_url", "image_url": {"url": data_url(PDF, "application/pdf")}},
        {"type": "video_url", "video_url": {"url": data_url(PDF, "video/mp4")}},
        {"type": "input_file", "filename": "scan.pdf", "file_data": data_url(PDF, "application/pdf")},
        {"type": "file", "file": {"filename": "scan.pdf", "file_data": data_url(PDF, "application/pdf")}},
    ):
        assert error_of(http.post("/v1/chat/completions", json=chat(part)))["message"] == f"<data URL> {message}"


def test_data_urls_as_browsers_write_them(http: TestClient, video: Path) -> None:
    text = base64.b64encode(video.read_bytes()).decode().rstrip("=")
    url = "data:video/mp4;codecs=avc1.42E01E,mp4a.40.2;base64," + "\n".join(
        text[i : i + 76] for i in range(0, len(text), 76)
    )
    plans = [
        http.post("/v1/media/plan", json={"content": [{"type": "video_url", "video_url": {"url": item}}]}).json()
        for item in (url, data_url(video.read_bytes(), "video/mp4"))
    ]
    assert plans[0] == plans[1] and plans[0]["media"][0]["frames"] > 1
