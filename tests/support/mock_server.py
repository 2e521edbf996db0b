"""A server that looks like `keye serve` to its page: the package's static files and canned answers, some hostile.

It follows the HTTP interface as far as the page uses it and runs no model. The answer is chosen by the question's text.
Everything that was requested is kept in `requests` for the tests to look at.
"""

from __future__ import annotations

import email
import email.policy
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import keye.server
from keye.server.edge.request_head import PAGE_CSP

STATIC = Path(keye.server.__file__).parent / "web" / "static"
SAMPLE = STATIC.parents[2] / "assets" / "demo.mp4"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
}
HOSTILE = (
    "<img src=x onerror=window.hacked=1><script>window.hacked=1</script><svg onload=window.hacked=1> "
    "[a](javascript:window.hacked=1) [[3.0, 8.5]] <b onclick=window.hacked=1>label</b>"
)
PLAN = {
    "kind": "video", "name": "demo.mp4", "frames": 32, "timestamps": [i / 2 for i in range(32)], "width": 224,
    "height": 224, "tokens_per_frame": 16, "visual_tokens": 512, "duration": 16.0,
    "notes": ["the file has 2 video tracks; the second is read"],
}  # fmt: skip
EVIDENCE = {
    "kind": "video", "name": "demo.mp4", "share": 1.0,
    "times": [i / 2 for i in range(32)],
    "shares": [0.09 if 6 <= i <= 16 else 0.002 for i in range(32)],
    "lifts": [2.9 if 6 <= i <= 16 else 0.1 for i in range(32)],
    "top": [7, 12, 15],
}  # fmt: skip
EVIL_EVIDENCE = {
    "kind": "video",
    "name": "demo.mp4",
    "share": 1.0,
    "times": [0, -5, 1e9, "3", None, {"a": 1}, *range(30_000)],
    "shares": [1e9, 0.5, 0.1, -4, "<b>", 0.2, *([0.1] * 30_000)],
    "lifts": "none",
    "top": [10**9, -1, 0, "x"],
}


def _evidence(medium: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """The shape of `keye.engine.evidence.Evidence.to_dict`."""
    return {"reason": reason, "steps": 12, "media": [medium]}


SCOPE = {
    "short": "drawn shapes only",
    "text": "This is the small model that comes with keye. It learned from drawn films of coloured shapes, "
    "up to 64 frames.",
    "frames": 64,
    "examples": ["the red circle", "the purple cross", "When is the red circle visible?"],
}
MODEL = {
    "scope": SCOPE, "measured_frames": 64, "capabilities": ["video"],
    "known_models": [
        {"name": "2.0", "hub_name": "Kwai-Keye/Keye-VL-2.0-30B-A3B", "bytes": 62_000_000_000, "fits": False},
        {"name": "1.5", "hub_name": "Kwai-Keye/Keye-VL-1_5-8B", "bytes": 5_000_000_000, "fits": True},
    ],
}  # fmt: skip
BROKEN = "broken.mp4 is cut short: 3.0 of 16.0 s can be read; download it again"
NOTE = "the reply names 50:00.0 to 50:05.0: outside what was looked at (0.0 s to 16.0 s), so not shown as a moment"
#: A server that can do everything, and a model for which the sample is long.
SEARCHING = {
    "measured_frames": 8,
    "capabilities": ["video", "find", "scenes", "subtitles", "frames", "export", "clips"],
}
LINES = [
    {"start": 1.0, "end": 2.5, "text": "The next point is the river bridge."},
    {"start": 3.2, "end": 5.0, "text": "In this red folder."},
    {"start": 9.0, "end": 11.0, "text": "The red folder, please."},
]
#: A library with a video in each state.
LIBRARY = {
    "folders": [{"name": "meetings", "watch": True, "path": "/srv/meetings"}],
    "videos": [
        {"id": f"library-{i}", "name": f"meetings/{name}.mp4", "state": state, "reason": reason, "duration": duration,
         "searchable": searchable, "bytes": size, "size": 1000, "path": None}
        for i, (name, state, reason, duration, searchable, size) in enumerate([
            ("Council meeting 14 May", "indexed", None, 7458.0, 7458.0, 1_100_000_000),
            ("Council meeting 30 April", "indexing", None, 11500.0, 4800.0, 700_000_000),
            ("Town hall", "discovered", None, 753.0, 0.0, 0),
            ("interview", "failed", "the file is cut short: its index is missing", None, 0.0, 0),
        ])
    ],
    "bytes": 3_100_000_000, "limit": 20_000_000_000, "may_manage": True, "problems": [],
    "indexing": {"id": "library-1", "stage": "index", "done": 4800, "total": 11500, "unit": "s", "seconds_left": 330,
                 "waiting": 1},
}  # fmt: skip
ROUTES = [f"/v1/video/{name}" for name in ("find", "scenes", "subtitles", "frames", "export")]
#: A grey picture of 8 x 8.
JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////////"
    "////////////////////wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAI"
    "AQEAAD8AH//Z"
)
LOOP = "the reply repeated itself and was stopped"
CIRCLE = "The red circle is visible at [[3.0, 8.5]] and from 0:12 on: [[12.0, 15.5]] red circle again; it moves up."


@dataclass
class MockServer:
    """Runs until `close`. With `key` every call under /v1 needs it. `release` lets a held-back answer go on;
    `checking`, if there is one, an upload that was sent and is being looked at."""

    key: str | None = None
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    disconnected: threading.Event = field(default_factory=threading.Event)
    checking: threading.Event | None = None
    busy: int = 0
    search: list[dict[str, Any]] = field(default_factory=list)
    subtitles: list[dict[str, Any]] = field(default_factory=list)
    library: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"mock": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def sent(self, path: str) -> list[Any]:
        """The JSON bodies that were sent to `path`."""
        return [body for _, where, body in self.requests if where == path]


def answer_chunks(question: str) -> Iterator[dict[str, Any]]:
    """What a streamed answer to a question is made of."""
    for phase, total in (("media", 32), ("encode", 32), ("prefill", 636)):
        for done in (total // 2, total):
            yield {"choices": [], "keye": {"progress": {"phase": phase, "done": done, "total": total}}}
    text = HOSTILE if "hostile" in question else CIRCLE
    text = "A dog <|box_start|>[[100, 200, 500, 700]]<|box_end|>." if "box" in question else text
    yield _delta(reasoning_content="First the start, then the end. <b onclick=window.hacked=1>")
    yield from (_delta(content=text[i : i + 9]) for i in range(0, len(text), 9))
    evil = "evil" in question
    box = {"kind": "box", "points": [[100, 200], [500, 700]], "label": "<b>dog</b>", "label_kind": "object"}
    yield {
        "choices": [],
        "usage": {"prompt_tokens": 636, "completion_tokens": 24, "total_tokens": 660, "media": [PLAN]},
        "keye": {
            "intervals": [[-1, 5], [2, "x"], None, [1e9, 2e9], [3.0, 8.5]] if evil else [[3.0, 8.5], [12.0, 15.5]],
            "regions": [{"kind": "box", "points": [[-4, 1e9]]}, 7] if evil else [box] if "box" in question else [],
            "evidence": _evidence(
                EVIL_EVIDENCE if evil else EVIDENCE, "<img src=x onerror=window.hacked=1>" if evil else None
            ),
            "attention": "sparse",
            **({"notes": [NOTE]} if "far" in question else {"notes": [LOOP]} if "loop" in question else {}),
        },
    }


def moment(rank: int, start: float, end: float, probability: float | None, **more: Any) -> dict[str, Any]:
    """A moment as the server sends it."""
    plain = {"checked": "no", "refined": False, "on_cut": None, "file": None, "subtitle": None}
    return {"id": f"m{rank}", "rank": rank, "start": start, "end": end, "probability": probability, **plain, **more}


def search_events(event: str, duration: float = 16.0) -> list[dict[str, Any]]:
    """What a search sends: how far it is, findings as they come, and what it was at its end."""
    line = {"start": 3.2, "end": 5.0, "text": "In this red folder."}
    first = moment(1, 3.0, 8.5, 0.94, checked="twice", refined=True, on_cut="start", subtitle=line)
    second = moment(2, 12.0, 15.0, 0.71, checked="twice", refined=True)
    weak = moment(3, 10.0, 11.0, 0.38, checked="failed")
    seen = [
        {"start": 0.0, "end": duration, "spacing": 1.0, "close": False},
        {"start": 2.0, "end": 9.0, "spacing": 0.2, "close": True},
    ]
    coverage = {
        "duration": duration, "seen": seen, "unseen": [], "places": 12, "frames": 8226, "index_tokens": 540_000,
        "query_tokens": 61_240, "share": 1.0,
    }  # fmt: skip
    nothing = "purple" in event
    result = {
        "query": event, "video": "sample.mp4", "model": "keye-nano", "found": not nothing,
        "moments": [] if nothing else [first, second], "weaker": [] if nothing else [weak],
        "presence": 0.02 if nothing else 0.96, "threshold": 0.5, "coverage": coverage,
        "notes": [{"code": "scope", "text": "keye-nano does not know real footage.", "place": "file"}],
        "seconds": {"coarse": 3.0, "close": 5.0}, "stopped": False,
    }  # fmt: skip
    progress = {"type": "progress", "unit": "s", "seconds_left": 40.0}
    return [
        {"type": "started", "id": "find-1"}, {"type": "waiting"},
        {**progress, "stage": "coarse", "done": 8.0, "total": duration},
        *([] if nothing else [{"type": "moments", "moments": [moment(1, 3.0, 8.0, 0.6)]}]),
        {**progress, "stage": "close", "done": 8, "total": 12, "unit": "place"},
        *([] if nothing else [{"type": "moments", "moments": [first, moment(2, 12.0, 15.0, 0.5)]}]),
        {"type": "result", "id": "find-1", "result": result},
    ]  # fmt: skip


def library_events(event: str) -> list[dict[str, Any]]:
    """What a search in the library sends."""
    places = [
        ("library-0", "meetings/Council meeting 14 May.mp4"),
        ("library-1", "meetings/Council meeting 30 April.mp4"),
    ]
    all_moments = [
        {**moment(rank, 60.0 * rank, 60.0 * rank + 3, probability, checked=checked, file=file), "name": name}
        for rank, probability, checked, (file, name) in [
            (1, 0.94, "twice", places[0]), (2, 0.71, "twice", places[1]), (3, 0.33, "no", places[0]),
        ]
    ]  # fmt: skip
    coverage = {"videos": 4, "searched_videos": 2, "duration": 41760.0, "searched": 34560.0,
                "missing": [{"file": "library-3", "name": "interview.mp4", "reason": "cut short"}]}  # fmt: skip
    result = {
        "query": event,
        "moments": all_moments[:2],
        "weaker": all_moments[2:],
        "threshold": 0.3,
        "coverage": coverage,
    }
    return [
        {"type": "started", "id": "find-2"},
        {"type": "progress", "stage": "coarse", "done": 10, "total": 40, "unit": "window", "seconds_left": 9.0},
        {"type": "moments", "moments": all_moments[:1]},
        {"type": "result", "id": "find-2", "result": result},
    ]


def _delta(**content: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content}]}


class _Handler(BaseHTTPRequestHandler):
    mock: MockServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.mock.requests.append(("GET", path, None))
        if path in ("/health", "/version"):
            return self._json({"status": "ok", "version": "0.2.0"})
        if not path.startswith("/v1/"):
            return self._static(path)
        if not self._allowed():
            return None
        if path == "/v1/models":
            facts = {"context": 8192, "attention": "sparse", **self.mock.model}
            return self._json({"data": [{"id": "keye-nano", "keye": facts}]})
        if path.startswith("/v1/library") and self.mock.library is None:
            return self._error(404, "this server has no library; start it with --library")
        if path == "/v1/library/events":
            return self._stream("slow", [{"type": "library", **(self.mock.library or {})}, {}], hold=1)
        if path.startswith("/v1/library/") and self.mock.library is not None:
            name, _, content = path.removeprefix("/v1/library/").partition("/")
            if content:
                return self._content(SAMPLE.read_bytes())
            return self._json(next(video for video in self.mock.library["videos"] if video["id"] == name))
        if path.startswith("/v1/video/find/"):
            return self._send(200, b"<!doctype html>", "text/html")
        if path == "/v1/files":
            return self._json({"data": list(self.mock.files.values())})
        name, _, content = path.removeprefix("/v1/files/").partition("/")
        if name not in self.mock.files:
            return self._error(404, "There is no such file.")
        return self._content(self.mock.contents[name]) if content else self._json(self.mock.files[name])

    def do_DELETE(self) -> None:
        self.mock.requests.append(("DELETE", self.path, None))
        self.mock.files.pop(self.path.removeprefix("/v1/files/"), None)
        self._json({"deleted": True})

    def _content(self, content: bytes) -> None:
        """All bytes or, as players ask for them, a range."""
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end or len(content)), len(content) - 1)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Accept-Ranges": "bytes"}
        self._send(206, content[first : last + 1], "application/octet-stream", headers)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        is_json = self.headers["Content-Type"].startswith("application/json")
        body = json.loads(raw) if is_json else None
        self.mock.requests.append(("POST", self.path, body))
        if not self._allowed():
            return
        if self.path == "/v1/files":
            self._upload(raw)
        elif self.path == "/v1/media/plan":
            self._json({"media": [PLAN], "visual_tokens": 512, "prompt_tokens": 620, "context": 8192, "fits": True})
        elif self.path == "/v1/video/ground":
            pairs = [] if "purple" in body["event"] else [[3.0, 8.5]]
            keye = {"intervals": pairs, "regions": [], "evidence": _evidence(EVIDENCE), "attention": "sparse"}
            usage = {"prompt_tokens": 636, "completion_tokens": 7, "media": [PLAN]}
            result = {"intervals": pairs, "text": json.dumps(pairs), "usage": usage, "keye": keye}
            steps = [{"keye": {"progress": {"phase": "media", "done": done, "total": 32}}} for done in (16, 32)]
            self._stream(
                body["event"],
                [*steps, {"delta": {"content": result["text"]}}, {"object": "keye.ground", **result}],
                hold=2,
            )
        elif self.path in ROUTES and self.path.rsplit("/", 1)[-1] in self.mock.model.get("capabilities", ()):
            self._search_route(body)
        elif self.path == "/v1/library/find":
            self._stream(body["event"], library_events(body["event"]), hold=3)
        elif self.path.startswith("/v1/video/find/"):
            self.mock.release.set()
            self._json({"stopping": True})
        elif self.path == "/v1/clips":
            self._send(200, SAMPLE.read_bytes(), "video/mp4")
        else:
            self._chat(body)

    def _search_route(self, body: dict[str, Any]) -> None:
        if self.path == "/v1/video/find":
            self._stream(body["event"], self.mock.search or search_events(body["event"]), hold=4)
        elif self.path == "/v1/video/scenes":
            result = {"cuts": [4.0, 9.5], "scenes": [{"start": a, "end": b} for a, b in ((0, 4), (4, 9.5), (9.5, 16))]}
            self._stream("", [{"type": "started", "id": "scan-1"}, {"type": "result", "result": result}], hold=9)
        elif self.path == "/v1/video/subtitles":
            text = (body.get("subtitles") or {}).get("text")
            lines = self.mock.subtitles if text is None else [{"start": 1.0, "end": 2.0, "text": text}]
            track = {"id": "1", "origin": "track", "name": "", "language": "en"} if lines else None
            self._json({"tracks": [track] if track else [], "track": track, "lines": lines, "notes": []})
        elif self.path == "/v1/video/frames":
            self._json({"data": [{"url": f"data:image/jpeg;base64,{JPEG}"} for _ in body["times"]]})
        else:
            headers = {
                "Content-Disposition": "attachment; filename*=UTF-8''the%20red%20circle.xml",
                "Keye-Notes": json.dumps(["Times fall on whole frames: at most 250 ms from the answer."]),
            }
            self._send(200, b"<xmeml/>", "application/xml", headers)

    def _chat(self, body: dict[str, Any]) -> None:
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        if "busy" in question and self.mock.busy == 0:
            self.mock.busy = 1
            return self._error(429, "32 requests wait already.", {"Retry-After": "7"})
        return self._stream(question, answer_chunks(question), hold=12)

    def _stream(self, question: str, chunks: Iterable[dict[str, Any]], *, hold: int) -> None:
        """The chunks, broken off or held back at the one numbered `hold` where the question says so."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for count, chunk in enumerate(chunks):
                if "cut" in question and count == hold:
                    return
                if "slow" in question and count == hold:
                    self._hold()
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.mock.disconnected.set()

    def _hold(self) -> None:
        """Keeps the stream open with comments, as a slow model would, until the test says so or the client is gone."""
        while not self.mock.release.wait(0.05):
            self.wfile.write(b": still here\n\n")
            self.wfile.flush()

    def _upload(self, raw: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + raw, policy=email.policy.HTTP)
        part = next(part for part in message.iter_parts() if part.get_filename())  # type: ignore[attr-defined]
        name, content = f"file-{len(self.mock.files)}", part.get_payload(decode=True)
        if self.mock.checking is not None:
            self.mock.checking.wait(20)
        if "broken" in str(part.get_filename()):
            return self._error(400, BROKEN)
        video = part.get_content_type().startswith("video/")
        keye = {"kind": "video", "duration": 16.0, "fps": 2.0} if video else {"kind": "image"}
        self.mock.contents[name] = content
        self.mock.files[name] = {
            "id": name, "object": "file", "bytes": len(content), "filename": part.get_filename(), "purpose": "media",
            "keye": {**keye, "width": 448, "height": 448},
        }  # fmt: skip
        self._json(self.mock.files[name])

    def _allowed(self) -> bool:
        if self.mock.key is None or self.headers["Authorization"] == f"Bearer {self.mock.key}":
            return True
        self._error(401, "This server needs a key.")
        return False

    def _static(self, path: str) -> None:
        name = "index.html" if path == "/" else path.removeprefix("/static/")
        file = SAMPLE if name == "sample.mp4" else STATIC / name
        if "/" in name or not file.is_file():
            return self._error(404, "There is no such page.")
        return self._send(200, file.read_bytes(), TYPES[file.suffix], {"Content-Security-Policy": PAGE_CSP})

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "error", "param": None, "code": None}
        self._send(status, json.dumps({"error": error}).encode(), "application/json", headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
