"""One server in front of several: each request goes to the replica that has processed its media
(`keye.server.replicas.proxy`).

Each upload, index and live session is at one replica; the proxy knows which. A question about files of several replicas
goes to that of the first file, to which the others are copied. What a replica keeps is lost when it ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import from_json

from keye.server.edge.errors import ApiError
from keye.server.errors import install
from keye.server.openai.http import cancel_on_disconnect, count_numbers, error_end
from keye.server.replicas.processes import Replica, ReplicaLost, Reply, Watch, close_all, restart_when_ended, start_all
from keye.version import __version__

#: Headers that are passed on, to replicas and back; others belong to one connection, or are the guard's.
_REQUEST_HEADERS: Final = ("authorization", "x-api-key", "content-type", "accept", "range")
_REPLY_HEADERS: Final = (
    "content-type", "content-length", "content-disposition", "content-range", "accept-ranges", "cache-control", "etag",
    "last-modified", "retry-after", "x-accel-buffering",
)  # fmt: skip
_ID: Final = re.compile(r"(?:(?:file|index|live|find)-|resp_)[0-9a-f]{32}")
#: Paths whose answers begin with an id under which they can be asked for later.
_NAMING: Final = ("/v1/responses", "/v1/video/find")
_MAKERS: Final = ("/v1/files", "/v1/indexes", "/v1/live")
_OWN_ID: Final = re.compile(rb'"id": ?"((?:resp_|find-)[0-9a-f]{32})"')
#: How far the id of an answer is looked for.
_BEGIN_BYTES: Final = 4096
#: Ids whose replica is remembered; more than replicas keep.
_MOST_IDS: Final = 100_000
#: Seconds in which a replica must answer where all are asked.
_ALL_SECONDS: Final = 2.0
_METHODS: Final = ["GET", "HEAD", "POST", "DELETE"]
_BOUNDARY: Final = "keye-copy-of-an-upload"


class Proxy:
    """Sends requests to replicas. `loads` are the requests under way at each, `homes` the replica of each id, `copies`
    the ids of uploads at other replicas than their own."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.watch = Watch()
        self._keeping: list[asyncio.Task[None]] = []
        self.loads: Counter[str] = Counter()
        self.homes: dict[str, str] = {}
        self.copies: dict[tuple[str, str], str] = {}

    def forget(self, name: str) -> None:
        """A replica has ended, and what it kept with it."""
        self.homes = {kept_id: home for kept_id, home in self.homes.items() if home != name}
        self.copies = {
            (kept_id, at): copy for (kept_id, at), copy in self.copies.items() if at != name and kept_id in self.homes
        }  # fmt: skip

    async def start(self) -> None:
        """Starts all replicas, and looks after them until `close`."""
        await start_all(list(self.replicas.values()))
        for replica in self.replicas.values():
            self._keeping.append(asyncio.create_task(restart_when_ended(replica, self.forget)))
            self._keeping.append(asyncio.create_task(self.watch.watch(replica)))

    async def close(self) -> None:
        for task in self._keeping:
            task.cancel()
        await close_all(list(self.replicas.values()))

    async def cut(self) -> None:
        """Ends the replicas at once: answers that still come end with an error."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*(replica.kill() for replica in self.replicas.values()))

    def choose(self, key: str | None, ids: Sequence[str] = (), without: str | None = None) -> str:
        """The replica for a request that names `ids`; `ApiError` where none can answer it. `without` one that has just
        failed."""
        fixed = {self.homes[item] for item in ids if item in self.homes and not item.startswith("file-")}
        if len(fixed) > 1:
            raise ApiError(400, "the indexes of this request are at different replicas; ask about the videos instead")
        at = next(iter(fixed), None) or next((self.homes[item] for item in ids if item in self.homes), None)
        if at is not None and self.watch.is_silent(self.replicas[at]):
            raise ApiError(503, "the replica that keeps this does not answer; try again soon", code="replica_silent",
                           retry=5)  # fmt: skip
        loads = self._loads(without)
        return str(at) if at in loads else choose(key, loads)

    def _loads(self, without: str | None = None) -> dict[str, int]:
        """What those that can be asked have to do; `ApiError` where there are none. Silent ones only where all are."""
        alive = [name for name, replica in self.replicas.items() if replica.is_ready and name != without]
        if not alive:
            raise ApiError(503, "no replica is ready; try again soon", code="no_replica", retry=2)
        answering = [name for name in alive if not self.watch.is_silent(self.replicas[name])]
        return {name: self.loads[name] for name in answering or alive}

    async def send(
        self, name: str, request: Request, content: bytes | AsyncIterator[bytes], path: str | None = None
    ) -> Reply:
        """Asks a replica; the request counts as its load until the reply is closed."""
        query = f"?{request.url.query}" if request.url.query else ""
        headers = {key: request.headers[key] for key in _REQUEST_HEADERS if key in request.headers}
        self.loads[name] += 1
        open_ = True

        def end() -> None:
            nonlocal open_
            self.loads[name] -= open_
            open_ = False

        try:
            reply = await self.replicas[name].send(request.method, path or request.url.path + query, headers, content)
        except BaseException:
            end()
            raise

        async def close() -> None:
            end()
            await reply.close()

        return Reply(reply.status, reply.headers, reply.pieces, close)

    async def answer(self, request: Request) -> Response:
        """Any request that one replica can answer."""
        path, path_ids = request.url.path, _ID.findall(request.url.path)
        if path == "/v1/files" and request.method == "POST":
            # The one that keeps least, since questions about the upload go there too.
            stored = Counter(self.homes.values())
            home = min(self._loads(), key=lambda name: (stored[name], self.loads[name]))
            try:
                return await self.relay(request, home, await self.send(home, request, request.stream()))
            except ReplicaLost:
                raise ApiError(503, "the replica ended; send the file again", code="replica_lost", retry=1) from None
        content = await request.body()
        body = _object(content)
        ids = [*path_ids, *(text for _, text in texts_in(body) if _ID.fullmatch(text))]
        name: str | None = None
        for last in (False, True):
            name = self.choose(media_key(body), ids, without=name)
            try:
                sent = await self._with_copies(request, name, content, body, ids)
                reply = await cancel_on_disconnect(request, self.send(name, request, sent))
                return await self.relay(request, name, reply)
            except ReplicaLost:
                if last or path_ids:
                    raise ApiError(503, "the replica ended; try again", code="replica_lost", retry=1) from None
        raise AssertionError("the second try returns or raises")

    async def relay(self, request: Request, name: str, reply: Reply) -> Response:
        """The reply as it comes; of what makes or deletes something, the id is read."""
        headers = {key: reply.headers[key] for key in _REPLY_HEADERS if key in reply.headers}
        if request.method == "POST" and request.url.path in _MAKERS and reply.status == 200:
            content = await _read_all(reply)
            self._remember(str(_object(content).get("id")), name)
            return Response(content, reply.status, headers)
        if request.method == "POST" and request.url.path in _NAMING and reply.status == 200:
            reply = replace(reply, pieces=self._read_id(reply.pieces, name))
        if request.method == "DELETE" and reply.status == 200:
            await self._drop(request, request.url.path.rpartition("/")[2])
        kind = headers.get("content-type", "")
        if kind.startswith("application/json"):
            return Response(await _read_all(reply), reply.status, headers)  # in one piece, or not at all
        if kind.startswith("text/event-stream"):
            reply = replace(reply, pieces=_with_end(reply.pieces, request.url.path))
        return _Passed(reply, headers)

    async def _read_id(self, pieces: AsyncIterator[bytes], name: str) -> AsyncIterator[bytes]:
        """The pieces of an answer, whole or as events; the first id in it is its own."""
        begin = b""
        async for piece in pieces:
            if len(begin) < _BEGIN_BYTES:
                begin += piece
                if (match := _OWN_ID.search(begin)) is not None:
                    self._remember(match[1].decode(), name)
                    begin = b" " * _BEGIN_BYTES
            yield piece

    def _remember(self, kept_id: str, name: str) -> None:
        self.homes[kept_id] = name
        if len(self.homes) > _MOST_IDS:
            del self.homes[next(iter(self.homes))]

    async def _with_copies(
        self, request: Request, name: str, content: bytes, body: dict[str, Any], ids: Sequence[str]
    ) -> bytes:
        """The body for a replica, with the ids that uploads of others have there."""
        renamed = {}
        for item in dict.fromkeys(ids):
            home = self.homes.get(item)
            if home in (None, name) or not item.startswith("file-"):
                continue
            copy = self.copies.get((item, name)) or await self._copy(request, item, str(home), name)
            if copy is not None:
                self.copies[item, name] = renamed[item] = copy
        return json.dumps(with_names(body, renamed)).encode() if renamed else content

    async def _copy(self, request: Request, file_id: str, home: str, to: str) -> str | None:
        """Sends an upload from one replica to another, under the key of who asks; its id there. None for what is not
        theirs or gone: the answer is then that of a replica that does not have it."""
        headers = {key: request.headers[key] for key in ("authorization", "x-api-key") if key in request.headers}
        source = await self.replicas[home].send("GET", f"/v1/files/{file_id}/content", headers, b"")
        try:
            if source.status != 200:
                return None
            headers["content-type"] = f"multipart/form-data; boundary={_BOUNDARY}"
            reply = await self.replicas[to].send("POST", "/v1/files", headers, _form(source.pieces))
        finally:
            await source.close()
        copied = _object(await _read_all(reply))
        if reply.status != 200:
            raise ApiError(reply.status, str(copied.get("error", {}).get("message", "a file could not be copied")))
        return str(copied["id"])

    async def _drop(self, request: Request, name: str) -> None:
        self.homes.pop(name, None)
        for item, at in [key for key in self.copies if key[0] == name]:
            copy = self.copies.pop((item, at))
            try:
                reply = await self.send(at, request, b"", f"/v1/files/{copy}")
                await reply.close()
            except ReplicaLost:
                pass

    async def listed(self, request: Request) -> Response:
        """What all replicas keep for a key, without copies, the newest first."""
        stored: list[Any] = []
        copies = set(self.copies.values())
        for status, content in (await self._ask_all(request)).values():
            data = _object(content)
            if status != 200:
                return JSONResponse(data, status)
            stored += [item for item in data["data"] if item["id"] not in copies]
        stored.sort(key=lambda item: -item["created_at"])
        return JSONResponse({"object": "list", "data": stored, "has_more": False})

    async def metrics(self, request: Request) -> Response:
        """The metrics of all replicas, distinguished by a label."""
        texts = {name: content.decode() for name, (status, content) in (await self._ask_all(request)).items()}
        up = "# HELP keye_replica_up Whether the replica answers\n# TYPE keye_replica_up gauge\n"
        up += "".join(f'keye_replica_up{{replica="{name}"}} {int(good)}\n' for name, good in self.health().items())
        return Response("".join((*merged(texts), up)), media_type="text/plain; version=0.0.4")

    def health(self) -> dict[str, bool]:
        """Which replicas can be asked."""
        return {name: replica.is_ready and not self.watch.is_silent(replica) for name, replica in self.replicas.items()}

    async def _ask_all(self, request: Request) -> dict[str, tuple[int, bytes]]:
        """Status and body of what each replica answers to this request; those that do not answer in time are left
        out."""

        async def ask(name: str) -> tuple[int, bytes]:
            async with asyncio.timeout(_ALL_SECONDS):
                reply = await self.send(name, request, b"")
                return reply.status, await _read_all(reply)

        names = [name for name, good in self.health().items() if good]
        answers = await asyncio.gather(*map(ask, names), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, TimeoutError | ReplicaLost):
                raise answer
        pairs = zip(names, answers, strict=True)
        return {name: answer for name, answer in pairs if not isinstance(answer, BaseException)}


async def _with_end(pieces: AsyncIterator[bytes], path: str) -> AsyncIterator[bytes]:
    """Complete events of a stream; the last reports an error where the replica ends before it."""
    numbered, rest = 0, b""
    try:
        async for piece in pieces:
            rest += piece
            events, parted, rest = rest.rpartition(b"\n\n")
            if parted:
                numbered += count_numbers(events)
                yield events + parted
        if rest:
            yield rest
    except ReplicaLost:
        yield error_end(path, ApiError(503, "the replica ended; ask again", code="replica_lost"), numbered)


class _Passed(StreamingResponse):
    """A reply on its way to the client. It is closed at its end, however that comes, also where it never began."""

    def __init__(self, reply: Reply, headers: Mapping[str, str]) -> None:
        super().__init__(reply.pieces, reply.status, headers)
        self._reply = reply

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._reply.close()


async def _read_all(reply: Reply) -> bytes:
    try:
        return b"".join([piece async for piece in reply.pieces])
    finally:
        await reply.close()


async def _form(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="copy"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    async for piece in pieces:
        yield piece
    yield f"\r\n--{_BOUNDARY}--\r\n".encode()


def texts_in(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts in JSON data in their order, each after the key under which it stands."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(item, key)


def with_names(value: Any, names: Mapping[str, str]) -> Any:
    """JSON data with texts replaced."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [with_names(item, names) for item in value]
    if isinstance(value, dict):
        return {key: with_names(item, names) for key, item in value.items()}
    return value


def merged(texts: Mapping[str, str]) -> Iterator[str]:
    """Metrics of Prometheus with a label `replica`; what is said about a metric, once, and its samples behind that."""
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                if line not in comments.setdefault(family, []):
                    comments[family].append(line)
            elif line:
                metric, brace, rest = line.partition("{") if "{" in line else line.partition(" ")
                labelled = f'{{replica="{name}"' + (f",{rest}" if brace == "{" else f"}} {rest}")
                samples.setdefault(family, []).append(metric + labelled)
    for family in dict.fromkeys((*comments, *samples)):
        yield "".join(f"{line}\n" for line in (*comments.get(family, ()), *samples.get(family, ())))


def proxy_app(replicas: Sequence[Replica]) -> FastAPI:
    """The application in front of these replicas, without the guard. It starts and ends them with its lifespan."""
    proxy = Proxy(replicas)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await proxy.start()
        try:
            yield
        finally:
            await proxy.close()

    app = FastAPI(title="keye", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url=None, redirect_slashes=False)  # fmt: skip
    app.state.proxy = proxy
    install(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        health = proxy.health()
        status = "ok" if any(health.values()) else "starting"
        return JSONResponse({"status": status, "replicas": health}, 200 if status == "ok" else 503)

    app.add_api_route("/metrics", proxy.metrics, methods=["GET", "HEAD"])
    app.add_api_route("/v1/files", proxy.listed, methods=["GET"])
    app.add_api_route("/v1/indexes", proxy.listed, methods=["GET"])
    app.add_api_route("/{path:path}", proxy.answer, methods=_METHODS)
    return app


def _object(content: bytes) -> dict[str, Any]:
    """A body of JSON; nothing for any other."""
    try:
        value = from_json(content) if content else {}  # without a text of the whole in between
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


#: Characters that are hashed at a time.
_PIECE: Final = 1 << 20
#: What one replica may have, in parts of an even share.
SLACK: Final = 1.25
#: Keys of requests under which the name of a medium stands, or its bytes.
_NAMES: Final = (
    "video", "image", "url", "video_url", "image_url", "file_url", "file_id", "data", "file_data"
)  # fmt: skip


def choose(key: str | None, loads: Mapping[str, int], *, slack: float = SLACK) -> str:
    """A replica for a request about the media of `key`: `loads` are the requests under way at each. Without a key the
    one that has least to do. No replica gets more than `slack` times an even share, rounded up."""
    assert loads and slack >= 1
    if key is None:
        return min(loads, key=lambda name: (loads[name], name))
    most = math.ceil(slack * (sum(loads.values()) + 1) / len(loads))
    return next(name for name in ranking(key, loads) if loads[name] < most)


def ranking(key: str, replicas: Collection[str]) -> list[str]:
    """The replicas in the order in which this key prefers them; the same on every machine."""
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{name}\0{key}".encode()).digest())


def media_key(body: Mapping[str, Any]) -> str | None:
    """What requests about the same media have in common, whatever else they ask; None where there are none. Media are
    known by what the client sends: the same file under two names has two keys."""
    digest, has_media = hashlib.sha256(), False
    for name in (text for key, text in texts_in(body) if key in _NAMES):
        for at in range(0, len(name), _PIECE):  # a data: URL may have many megabytes
            digest.update(name[at : at + _PIECE].encode("utf-8", "replace"))
        digest.update(b"\0")
        has_media = True
    return digest.hexdigest() if has_media else None
