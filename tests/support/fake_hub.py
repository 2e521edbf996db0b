"""A hub on this machine: the parts of the Hugging Face API that fetching uses, and every way in which it can fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from urllib.parse import unquote, urlsplit

from keye.config import HubConfig

LARGE = 1000
"""Files of at least this many bytes are stored as the hub stores large files: by SHA-256, at another address."""


@dataclass
class FakeHub:
    """What the hub holds and how it behaves; tests change the fields while it runs."""

    name: str = "some-one/their-model"
    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    status: int = 200
    error_code: str = ""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """Bytes after which the connection breaks, one entry for each answer about a file."""
    corrupt: set[str] = field(default_factory=set)
    ignore_range: bool = False
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)
    port: int = 0

    def config(self, cache: Path, *, offline: bool = False) -> HubConfig:
        return HubConfig(endpoint=f"http://127.0.0.1:{self.port}", cache=cache, offline=offline, timeout=5)

    def info(self, commit: str) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.name, "modelId": self.name, "sha": commit, "private": False, "siblings": siblings}


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Runs the hub on a free port."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the look-up of the machine's own name that HTTPServer makes."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(path)
        if self.headers.get("Authorization"):
            hub.authorized.append(path)
        if path.startswith("/storage/"):
            return self.file(path.removeprefix("/storage/"))
        if hub.status != 200:
            return self.fail(hub.status, hub.error_code)
        api = f"/api/models/{hub.name}/revision/"
        if path.startswith(api):
            revision = path.removeprefix(api)
            commit = hub.revisions.get(revision, revision if revision in hub.revisions.values() else None)
            return self.send(json.dumps(hub.info(commit)).encode()) if commit else self.fail(404, "RevisionNotFound")
        prefix = f"/{hub.name}/resolve/"
        if path.startswith(prefix):
            name = path.removeprefix(prefix).partition("/")[2]
            if len(hub.files[name]) < LARGE:
                return self.file(name)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{hub.port}/storage/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.fail(404, "RepoNotFound")

    def file(self, name: str) -> None:
        hub, data = self.hub, self.hub.files[name]
        start, wanted = 0, self.headers.get("Range")
        if wanted and not hub.ignore_range:
            hub.ranges.append(f"{name} {wanted}")
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        body = data[start:]
        if name in hub.corrupt:
            body = bytes(byte ^ 1 for byte in body)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = hub.cut_after.get(name)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
