"""Speech to lines by a service that is named: what is sent where, and what of the answers is believed."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import av
import numpy as np
import pytest
from python_multipart.multipart import parse_options_header

from keye.chat.messages import Medium
from keye.commands.shared.subtitles import find_subtitles
from keye.errors import KeyeError, MediaError
from keye.media import speech
from keye.media.source.fetch import fetch_source, untrusted
from keye.media.speech import Transcriber, transcribe
from keye.media.subtitles import Subtitles


class Service:
    """A transcription service that answers what a test has put in `answers`, one after another, the last for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = [(200, b'{"segments": []}')]
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                service.received.append((self.path, dict(self.headers), body))
                status, answer = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def segments(self, *lines: tuple[float, float, Any]) -> None:
        """Answers with lines."""
        listed = [{"start": start, "end": end, "text": text} for start, end, text in lines]
        self.answers = [(200, json.dumps({"segments": listed}).encode())]

    def sound(self, number: int) -> tuple[dict[str, str], wave.Wave_read]:
        """The fields of a request and its sound."""
        _, headers, body = self.received[number]
        _, options = parse_options_header(headers["Content-Type"])
        fields, data = {}, b""
        for part in body.split(b"--" + options[b"boundary"])[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            _, named = parse_options_header(head.partition(b": ")[2].splitlines()[0])
            if b"filename" in named:
                data = content.removesuffix(b"\r\n")
            else:
                fields[named[b"name"].decode()] = content.strip().decode()
        return fields, wave.open(io.BytesIO(data))


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds of a tone that is silent from 1.4 to 1.8 s."""
    path, rate = tmp_path_factory.mktemp("speech") / "talk.mp4", 32_000
    times = np.arange(5 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * times) * ((times < 1.4) | (times > 1.8))
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=5)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=rate, layout="mono")
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def test_sound_is_sent_in_parts_that_end_where_it_is_quiet(
    service: Service, talk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are moved by the begin of their part; those outside it are not believed."""
    monkeypatch.setattr(speech, "_PART", 2.5)
    monkeypatch.setattr(speech, "_SEARCH", 2.0)
    service.segments((0.0, 1.0, " hello <b>there</b>"), (0.5, 900.0, "long"), (99.0, 100.0, "beyond"), (0.0, 1.0, 5))
    seconds: list[float] = []
    read = transcribe(
        untrusted(fetch_source(talk)), Transcriber(service.url, key="secret"), language="en",
        on_progress=lambda done, total: seconds.append(done / total),
    )  # fmt: skip
    lengths = []
    for number, (path, headers, _) in enumerate(service.received):
        fields, sound = service.sound(number)
        assert path == "/v1/audio/transcriptions" and headers["Authorization"] == "Bearer secret"
        assert fields["response_format"] == "verbose_json" and (fields["model"], fields["language"]) == (
            "whisper-1", "en",
        )  # fmt: skip
        assert (sound.getnchannels(), sound.getframerate()) == (1, 16_000)
        lengths.append(sound.getnframes() / 16_000)
    assert 1.4 < lengths[0] < 1.8 and sum(lengths) == pytest.approx(5.0, abs=0.1) and seconds[-1] == pytest.approx(1)
    begins = [0.0, lengths[0]]
    assert [(line.start, line.text) for line in read.lines[:4]] == [
        (pytest.approx(begin, abs=1e-3), text) for begin, text in
        ((begins[0], "hello there"), (begins[0] + 0.5, "long"), (begins[1], "hello there"), (begins[1] + 0.5, "long"))
    ]  # fmt: skip
    assert read.lines[1].end == pytest.approx(lengths[0], abs=1e-3) and "no valid times" in read.notes[0]


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (200, b"{}", "gives no segments"),
        (200, b"[" * 100_000, "gives no segments"),
        (200, b"not json", "gives no segments"),
        (401, b'{"error": "no key"}', "answers 401"),
        (307, b"", "answers 307"),
    ],
)
def test_answers_that_are_no_transcription_are_errors(
    service: Service, talk: Path, status: int, answer: bytes, words: str
) -> None:
    service.answers = [(status, answer)]
    with pytest.raises(KeyeError, match=words):
        transcribe(talk, Transcriber(service.url))
    assert [path for path, _, _ in service.received] == ["/v1/audio/transcriptions"], "no redirect is followed"


def test_a_busy_service_is_asked_again(service: Service, talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "_WAIT", 0.0)
    service.answers = [(429, b""), (503, b""), (200, b'{"segments": [{"start": 0, "end": 1, "text": "a"}]}')]
    assert [line.text for line in transcribe(talk, Transcriber(f"{service.url}/audio/transcriptions")).lines] == ["a"]
    service.answers = [(503, b"busy")]
    with pytest.raises(KeyeError, match="answers 503"):
        transcribe(talk, Transcriber(service.url))


def test_a_large_answer_and_no_answer_are_errors(service: Service, talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "_MOST_ANSWER", 10)
    with pytest.raises(KeyeError, match="larger"):
        transcribe(talk, Transcriber(service.url))
    with pytest.raises(KeyeError, match="cannot be reached"):
        transcribe(talk, Transcriber("http://127.0.0.1:1/v1"))


@pytest.mark.parametrize(
    ("url", "key"), [("http://h:99999/", None), ("http://[h/", None), ("http://h/v1", "a key\nof two lines")]
)
def test_an_address_or_key_that_cannot_be_is_rejected(url: str, key: str | None) -> None:
    with pytest.raises(KeyeError, match="transcri"):
        Transcriber(url, key=key)


def test_work_ends_where_it_is_checked(service: Service, talk: Path) -> None:
    def check() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        transcribe(talk, Transcriber(service.url), check=check)
    assert service.received == []


def test_a_video_without_sound_is_an_error(service: Service, clips: list[Path]) -> None:
    with pytest.raises(MediaError, match="no sound"):
        transcribe(clips[0], Transcriber(service.url))


@pytest.mark.parametrize("url", ["", "ftp://a/b", "http://", "file:///etc/passwd", "http://u:p@a/", "http://a b/"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(KeyeError, match="transcribe is"):
        Transcriber(url)


def test_the_command_line_transcribes_what_has_no_subtitles(
    service: Service, talk: Path, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where a service is named; the key comes from the environment. A video without sound has no lines."""
    monkeypatch.setenv("KEYE_TRANSCRIBE_KEY", "from the environment")
    service.segments((0.0, 1.0, "hello"))
    options: dict[str, Any] = {"transcribe": service.url, "transcribe_model": "large", "subtitles": None}
    video = tmp_path / "talk.mp4"
    video.write_bytes(talk.read_bytes())
    medium = Medium("video", fetch_source(video), {})
    read = find_subtitles(medium, options)
    assert isinstance(read, Subtitles) and read.lines[0].text == "hello"
    assert service.received[0][1]["Authorization"] == "Bearer from the environment"
    assert service.sound(0)[0]["model"] == "large"
    assert find_subtitles(Medium("video", fetch_source(clips[0]), {}), options) is None
    (tmp_path / "talk.srt").write_text("1\n00:01 --> 00:02\nown\n")
    own = find_subtitles(medium, options)
    assert isinstance(own, Subtitles) and own.lines[0].text == "own"
    assert find_subtitles(medium, {**options, "transcribe": None, "transcribe_model": None}) is None
    assert len(service.received) == 1
