"""A watcher reports an event once, after a second question; sources come back; reports arrive or are counted."""

from __future__ import annotations

import datetime
import http.server
import json
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye.errors import KeyeError, MediaError
from keye.media.live import LiveFrame
from keye.sessions.alerts import Webhook, append_digest
from keye.sessions.search.looks import Look, Spans
from keye.sessions.watch import Watcher, WatchEvent, WatchOptions
from keye.sessions.watch_source import FrameQueue, watch_source

ODDS = {True: 5.0, False: -5.0}


def frame(second: float, level: int = 0) -> LiveFrame:
    return LiveFrame(second, np.full((4, 4, 3), level, np.uint8), second)


class Seer:
    """An asker that sees what is white; `doubts` makes it deny what it is asked about alone."""

    def __init__(self, *, doubts: bool = False) -> None:
        self.doubts, self.shapes = doubts, list[tuple[int, ...]]()

    def ask_presence(self, looks: Sequence[Look]) -> list[float | None]:
        return [
            ODDS[bool(self.ask_spans([look], [False])[0]) and not (self.doubts and len(look.times) < 8)]
            for look in looks
        ]

    def ask_spans(self, looks: Sequence[Look], certain: Sequence[bool]) -> list[Spans | None]:
        return [self._spans(look) for look in looks]

    def _spans(self, look: Look) -> Spans:
        assert look.pixels is not None
        self.shapes.append(look.pixels.shape)
        white = [i for i, picture in enumerate(look.pixels) if picture.mean() > 127]
        starts = [i for i in white if i - 1 not in white]
        ends = [i for i in white if i + 1 not in white]
        return tuple(zip(starts, ends, strict=True))


def run(watcher: Watcher, white: Sequence[tuple[float, float]], seconds: float = 60.0) -> list[WatchEvent]:
    events = list[WatchEvent]()
    for i in range(int(seconds * 2)):
        second = i / 2
        watcher.add(frame(second, 255 * any(start <= second < end for start, end in white)))
        if watcher.is_due:
            events += watcher.look()
    return events + watcher.finish()


def test_an_event_is_reported_when_it_begins_and_when_it_ends() -> None:
    watcher = Watcher(Seer(), "light", "camera")
    events = run(watcher, [(10.0, 24.0)])
    assert [(event.kind, event.number, event.start, event.end) for event in events] == [
        ("start", 1, 10.0, None), ("end", 1, 10.0, 24.0),
    ]  # fmt: skip
    assert events[0].probability == pytest.approx(0.9933, abs=1e-4)
    assert watcher.reported == 1 and watcher.rejected == 0 and watcher.questions == 60


def test_a_short_event_is_reported_at_once_with_its_end() -> None:
    events = run(Watcher(Seer(), "light", "camera", WatchOptions(every=4.0)), [(10.0, 11.0)])
    assert [(event.kind, event.start, event.end) for event in events] == [("start", 10.0, None), ("end", 10.0, 11.0)]


def test_what_the_second_question_denies_is_not_reported() -> None:
    watcher = Watcher(Seer(doubts=True), "light", "camera")
    assert run(watcher, [(10.0, 11.0)]) == []
    assert watcher.rejected > 0


def test_the_same_event_soon_after_is_not_reported_again() -> None:
    light = [(10.0, 12.0), (20.0, 22.0), (50.0, 52.0)]
    starts = [event.start for event in run(Watcher(Seer(), "light", "camera"), light) if event.kind == "start"]
    assert starts == [10.0, 50.0]
    eager = Watcher(Seer(), "light", "camera", WatchOptions(cooldown=0.0))
    assert [event.start for event in run(eager, light) if event.kind == "start"] == [10.0, 20.0, 50.0]


def test_an_event_that_goes_on_ends_with_the_source() -> None:
    events = run(Watcher(Seer(), "light", "camera"), [(50.0, 90.0)])
    assert events[-1].kind == "end" and events[-1].end == pytest.approx(59.5)


def test_a_window_holds_no_frames_from_before_a_gap_or_of_another_size() -> None:
    seer = Seer()
    watcher = Watcher(seer, "light", "camera")
    for second in (0.0, 0.5, 1.0, 30.0, 30.5):
        watcher.add(frame(second))
    watcher.look()
    watcher.add(LiveFrame(31.0, np.zeros((8, 8, 3), np.uint8), 31.0))
    watcher.look()
    assert seer.shapes == [(2, 4, 4, 3)] * 2 + [(1, 8, 8, 3)] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"rate": 0}, "rate must be"), ({"threshold": 1.0}, "threshold must be"), ({"cooldown": -1}, "cooldown must be"),
     ({"window_frames": 2}, "window_frames must be")],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        WatchOptions(**options)


class Camera:
    """A source that gives so many frames each time that it is opened, then drops; at last it refuses."""

    name, is_endless = "camera", True

    def __init__(self, *batches: int | str) -> None:
        self.batches, self.second = list(batches), 0.0

    def frames(self) -> Iterator[LiveFrame]:
        batch = self.batches.pop(0)
        if batch == "no processes":
            raise BlockingIOError(batch)
        if isinstance(batch, str):
            raise MediaError(batch)
        for _ in range(batch):
            yield frame(self.second)
            self.second += 0.5

    def write_clip(self, start: float, end: float, folder: Path, name: str) -> Path | None:
        return None

    def close(self) -> None:
        self.batches.clear()


def test_a_source_that_drops_is_opened_again_later_and_later() -> None:
    waits, notes = list[float](), list[str]()

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 6

    queue = FrameQueue(Camera(3, "no route", "no processes", "no route", 2, 2), on_note=notes.append, wait=wait)
    count = 0
    while batch := queue.take():
        count += len(batch)
    queue.close()
    assert count == 7 and queue.counts.frames == 7 and queue.counts.reconnects == 6
    assert waits == [1.0, 2.0, 4.0, 8.0, 1.0, 1.0]
    assert notes[0] == "camera dropped (it ended); opening it again in 1 s"
    assert "camera is back (reconnect 4)" in notes


def test_a_source_that_never_opens_is_an_error() -> None:
    queue = FrameQueue(Camera("camera cannot be reached (refused)"))
    with pytest.raises(MediaError, match="cannot be reached"):
        queue.take()
    queue.close()


def test_a_slow_model_sees_the_newest_frames_and_a_file_waits() -> None:
    watcher, wait = Watcher(Seer(), "light", "camera"), lambda seconds: True
    live = FrameQueue(Camera(1000), wait=wait)
    live._thread.join(30)  # all frames have come before the first is taken
    assert list(watch_source(live, watcher)) == []
    assert live.counts.unseen == 1000 - 256 and watcher.questions == 1
    watcher = Watcher(Seer(), "light", "file")
    played = FrameQueue(Camera(1000), lossless=True, wait=wait)
    assert list(watch_source(played, watcher, lossless=True)) == []
    assert played.counts.unseen == 0 and watcher.questions == 500


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(server.statuses.pop(0) if server.statuses else 200)
        self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
        self.end_headers()
        server.came.release()

    def log_message(self, format: str, *arguments: object) -> None:
        return


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.bodies, self.statuses, self.came = list[bytes](), list[int](), threading.Semaphore(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as listening:
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield listening
        listening.shutdown()


def test_a_webhook_gets_reports_again_after_a_failure(server: _Server) -> None:
    server.statuses = [503, 429]
    hook = Webhook(server.url, backoff=0.01)
    hook.post({"kind": "start", "event": "Tür"})
    for _ in range(3):
        assert server.came.acquire(timeout=30)
    hook.close()
    assert [json.loads(body)["event"] for body in server.bodies] == ["Tür"] * 3
    assert (hook.delivered, hook.failed) == (1, 0)


@pytest.mark.parametrize("status", [302, 404])
def test_a_webhook_follows_no_redirect_and_gives_up_where_trying_is_useless(server: _Server, status: int) -> None:
    server.statuses, sentences = [status], list[str]()
    hook = Webhook(server.url, sentences.append, backoff=0.01)
    hook.post({"kind": "start"})
    hook.close()
    assert len(server.bodies) == 1 and (hook.delivered, hook.failed) == (0, 1)
    assert sentences == [f"the webhook did not take a report (status {status})"]


def test_a_webhook_that_hangs_drops_what_does_not_fit() -> None:
    hook = Webhook("http://127.0.0.1:9/none", backoff=60.0)
    for _ in range(200):
        hook.post({"kind": "start"})
    assert hook.dropped >= 200 - 64 - 1
    hook.close(0.1)


def test_a_server_that_speaks_no_http_fails_and_what_never_left_counts_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(b"no such protocol\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        sentences: queue.Queue[str] = queue.Queue()
        hook = Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/hook", sentences.put)
        hook._closing.set()  # one try each
        hook.post({"kind": "start"})
        assert "no such protocol" in sentences.get(timeout=30)
        for _ in range(3):  # the second connection is never answered
            hook.post({"kind": "end"})
        hook.close(0.05)
    assert (hook.delivered, hook.failed, hook.dropped) == (0, 4, 0)


@pytest.mark.parametrize("url", ["ftp://host/x", "http:///x", "http://host:99999/x", "http://ho st/"])
def test_webhooks_that_are_no_addresses(url: str) -> None:
    with pytest.raises(KeyeError, match="not an http or https address"):
        Webhook(url)


def test_the_digest_of_each_day_is_a_file(tmp_path: Path) -> None:
    report = WatchEvent("end", 1, "a <b> | c", "cam*era", 61.0, 64.5, 0.876, clip="/x/clip.ts").to_dict()
    for name in ("day.md", "day.html"):
        for hour in (1, 2):
            append_digest(tmp_path / name, report, datetime.datetime(2026, 11, 30, hour, 5))
        append_digest(tmp_path / name, report, datetime.datetime(2026, 12, 1, 1, 5))
    lines = (tmp_path / "day-2026-11-30.md").read_text().splitlines()
    assert lines[0] == "# cam\\*era, 2026-11-30" and len(lines) == 6
    assert lines[-1] == "| 02:05:00 | a \\<b\\> \\| c | 1:01.0 to 1:04.5 | 88% | clip.ts |"
    page = (tmp_path / "day-2026-12-01.html").read_text()
    assert page.count("<h1>") == 1 and "<td>a &lt;b&gt; | c</td>" in page
    with pytest.raises(KeyeError, match="cannot be written"):
        append_digest(tmp_path / "none" / "day.md", report, datetime.datetime(2026, 11, 30))
