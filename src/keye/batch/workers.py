"""What answers the questions of a batch: OpenAI-compatible servers, the engine in this process, engines in processes of
their own, and engines as actors on a Ray cluster, on whose nodes the paths of a manifest must mean the same files. All
of them take the body of a chat completion; `ask` is the same for all.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
import mimetypes
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import httpx

from keye.batch.manifest import Item, media_places
from keye.errors import KeyeError
from keye.files import BATCH_PREFIX, PrivateFolder
from keye.media.source.fetch import fetch_source
from keye.process import ChildProcess
from keye.units import MIB, format_bytes

if TYPE_CHECKING:
    from fastapi import FastAPI

_ROUTE: Final = "/v1/chat/completions"
#: Largest file that is sent inside a request, in bytes: a body of keye serve may have 64 MiB, and base64 adds a third.
INLINE_BYTES: Final = 45 * MIB
#: Statuses after which the same request may succeed.
_RETRY_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Longest wait before another try, in seconds.
_LONGEST_WAIT: Final = 30.0
#: Seconds in which a server must answer by default, accept a connection, and list its models.
ANSWER_SECONDS: Final = 3600.0
_CONNECT_SECONDS: Final = 10.0
_MODELS_SECONDS: Final = 30.0
#: A Retry-After in seconds; it may also be a date.
_SECONDS: Final = re.compile("[0-9]{1,9}")
#: Makes an application of settings, the number of slots, and whether private addresses may be opened
#: (`keye.server.batch_engine.engine_app`).
MakeApp = Callable[[Mapping[str, Any], int, bool], Any]
#: Seconds in which a cluster must find room for an engine and the engine must load its model.
_READY_SECONDS: Final = 1800.0
Pause = Callable[[float], Awaitable[object]]


class WorkerLost(KeyeError):
    """A worker does not answer any more. `during`: it was lost while it worked on the question."""

    def __init__(self, sentence: str, *, during: bool = True) -> None:
        super().__init__(sentence)
        self.during = during


@dataclass(frozen=True)
class Answer:
    """An HTTP status and the JSON object with it."""

    status: int
    body: Mapping[str, Any]


class Worker(Protocol):
    """`slots` questions may be under way at once. `start` makes it ready, also again after it was lost; `WorkerLost`
    where it cannot. `close` ends it; both may be called again."""

    name: str
    slots: int

    async def start(self) -> None: ...

    async def ask(self, item: Item) -> Answer:
        """The answer, good or bad; `WorkerLost` where there is none, `KeyeError` for media that cannot be sent."""

    async def close(self) -> None: ...


@dataclass
class Client:
    """Posts questions to an application, over a socket or in this process. Each request has `tries`, in each of which
    the answer must be complete after `seconds`; `inline` sends our files with the question, for servers that cannot
    open them. `pause` waits between tries."""

    http: httpx.AsyncClient
    name: str
    tries: int = 1
    inline: bool = False
    seconds: float | None = None
    pause: Pause = asyncio.sleep

    async def post(self, body: Mapping[str, Any]) -> Answer:
        """One chat completion."""
        content = await asyncio.to_thread(lambda: json.dumps(with_files(body) if self.inline else body).encode())
        headers = {"Content-Type": "application/json"}
        try:
            answer = await self._retry(
                lambda: self.http.post(_ROUTE, content=content, headers=headers),
                self.seconds,
                (httpx.TransportError,),  # not TimeoutError: another try would take as long
            )
        except TimeoutError:
            raise WorkerLost(f"{self.name} gave no answer in {self.seconds:g} s") from None
        except httpx.DecodingError:
            message = "the server's answer is not compressed as its headers say"
            return Answer(502, {"error": {"code": "bad_answer", "message": message}})
        except httpx.TransportError as error:
            unmet = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            reason = str(error) or type(error).__name__
            raise WorkerLost(f"{self.name} does not answer ({reason})", during=not unmet) from None
        except RuntimeError:
            if not self.http.is_closed:
                raise
            raise WorkerLost(f"{self.name} was closed", during=False) from None
        return Answer(answer.status_code, _json_object(answer))

    async def first_model(self) -> str | None:
        """The name of the server's first model, None where it lists none; `WorkerLost` where it cannot be reached,
        `KeyeError` where it wants another key."""
        errors = (httpx.RequestError, TimeoutError)  # a server that still loads its model may be slow to list it
        try:
            answer = await self._retry(lambda: self.http.get("/v1/models"), _MODELS_SECONDS, errors)
        except errors as error:
            reason = str(error) or type(error).__name__
            raise WorkerLost(f"{self.name} cannot be reached ({reason}): check --server") from None
        if answer.status_code in (401, 403):
            raise KeyeError(f"{self.name} wants another key: set KEYE_API_KEY to one that it takes")
        models = _json_object(answer).get("data")
        first = models[0] if isinstance(models, list) and models else None
        name = first.get("id") if answer.status_code == 200 and isinstance(first, dict) else None
        return name if isinstance(name, str) else None

    async def _retry(
        self, send: Callable[[], Awaitable[httpx.Response]], seconds: float | None, errors: tuple[type[Exception], ...]
    ) -> httpx.Response:
        """The answer to a request, which is tried again after one of `errors`, or when the server is full or fails,
        after as long as it says or twice as long each time. Each try has `seconds`; the last one raises its error."""
        for attempt in range(self.tries):
            last, retry_after = attempt == self.tries - 1, ""
            try:
                async with asyncio.timeout(seconds):
                    answer = await send()
                if answer.status_code not in _RETRY_STATUSES or last:
                    return answer
                retry_after = answer.headers.get("retry-after", "")
            except errors:
                if last:
                    raise
            await self.pause(retry_wait(attempt, retry_after))
        raise AssertionError("there is at least one try")


class ServerWorker:
    """Any OpenAI-compatible server, which has `seconds` for an answer. `model` is what it calls its model, by default
    the first that it lists. `transport` is that of `httpx`, by default over the network."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        key: str | None,
        slots: int,
        tries: int,
        seconds: float = ANSWER_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name, self.slots, self.model = url, slots, model
        http = httpx.AsyncClient(
            base_url=_server_root(url),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=slots, max_keepalive_connections=slots),
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            transport=transport,
        )
        self._client = Client(http, self.name, tries=tries, inline=True, seconds=seconds)

    async def start(self) -> None:
        """Checks that the server can be reached and takes our key."""
        first = await self._client.first_model()
        if self.model is None and first is None:
            raise KeyeError(f"{self.name} lists no models at /v1/models: check --server, or name one with --model")
        self.model = self.model or first

    async def ask(self, item: Item) -> Answer:
        return await self._client.post({"model": self.model, **item.body})

    async def close(self) -> None:
        await self._client.http.aclose()


class EngineWorker:
    """An application with an engine in this process (`keye.server.batch_engine.local_app`)."""

    def __init__(self, app: FastAPI, *, slots: int, name: str = "engine") -> None:
        self.name, self.slots, self._app = name, slots, app
        self._exits = AsyncExitStack()
        self._client: Client | None = None

    async def start(self) -> None:
        if self._client is None:
            await self._exits.enter_async_context(self._app.router.lifespan_context(self._app))
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            self._client = Client(await self._exits.enter_async_context(_local_http(transport)), self.name)

    async def ask(self, item: Item) -> Answer:
        return await self.post(item.body)

    async def post(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a body."""
        assert self._client is not None, "the worker was not started"
        return await self._client.post(without_model(body))

    async def close(self) -> None:
        await self._exits.aclose()


class ProcessWorker:
    """An engine in a process of its own, which is started again when it is lost and ends with this one. `arguments` of
    the interpreter run it (`keye.server.batch_engine`), `settings` are those of `keye.load`, and `threads`."""

    def __init__(
        self,
        arguments: Sequence[str],
        settings: Mapping[str, Any],
        *,
        slots: int,
        allow_private: bool = False,
        name: str,
    ) -> None:
        self.name, self.slots, self._arguments = name, slots, tuple(arguments)
        self._home = PrivateFolder(BATCH_PREFIX)  # only this user can use the socket in it
        self._socket = self._home.path / "engine"
        self._order = {
            "settings": dict(settings), "slots": slots, "allow_private": allow_private, "socket": str(self._socket),
            "folder": str(self._home.path),  # files of a process that was killed are removed with it
        }  # fmt: skip
        self._process: ChildProcess | None = None
        self._client: Client | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        await self._stop()
        self._socket.unlink(missing_ok=True)
        self._process = ChildProcess(self._arguments, self._order)
        if await asyncio.to_thread(self._process.read_report) is None:
            raise WorkerLost(f"{self.name} could not start; see its messages above")
        self._client = Client(_local_http(httpx.AsyncHTTPTransport(uds=str(self._socket))), self.name)

    async def ask(self, item: Item) -> Answer:
        if self._client is None:
            raise WorkerLost(f"{self.name} has ended", during=False)
        return await self._client.post(without_model(item.body))

    async def close(self) -> None:
        await self._stop()
        self._home.remove()

    async def _stop(self) -> None:
        if self._client is not None:
            await self._client.http.aclose()
            self._client = None
        if self._process is not None:
            self._process.kill()  # it holds nothing that has to be saved
            await asyncio.to_thread(self._process.wait)
            self._process.close()
            self._process = None


def ray_workers(
    address: str,
    make_app: MakeApp,
    settings: Mapping[str, Any],
    *,
    count: int | None,
    slots: int,
    allow_private: bool = False,
) -> list[Worker]:
    """`count` workers on the cluster at `address` (see `ray_cluster.connect`): by default one for each GPU where
    engines run on GPUs, else one for each node."""
    from keye.cluster.ray_cluster import connect

    ray, _ = connect(address)
    gpus = str(settings.get("device", "cpu")).startswith("cuda")
    if count is None:
        count = int(ray.cluster_resources().get("GPU", 0)) if gpus else len(ray.nodes())
    if count == 0:
        raise KeyeError(f"the cluster at {address} has no GPU: add nodes that have one, or give --device cpu")
    return [
        RayWorker(
            ray, (make_app, dict(settings), slots, allow_private), slots=slots, gpus=int(gpus), name=f"actor {number}"
        )
        for number in range(count)
    ]


class Engine:
    """What runs on the cluster: the worker of one process."""

    def __init__(self, make_app: MakeApp, settings: Mapping[str, Any], slots: int, allow_private: bool) -> None:
        self._worker = EngineWorker(make_app(settings, slots, allow_private), slots=slots)

    async def start(self) -> int:
        """Makes it ready and returns its process id."""
        await self._worker.start()
        return os.getpid()

    async def ask(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = await self._worker.post(body)
        return answer.status, dict(answer.body)


class RayWorker:
    """One engine on a cluster, placed again when it is lost. `arguments` are those of `Engine`."""

    def __init__(self, ray: Any, arguments: tuple[Any, ...], *, slots: int, gpus: int, name: str) -> None:
        self.name, self.slots, self._ray, self._arguments = name, slots, ray, arguments
        # One more call than questions, for `start`.
        self._actor_class = ray.remote(Engine).options(num_cpus=1, num_gpus=gpus, max_concurrency=slots + 1)
        self._actor: Any = None
        self.pid: int | None = None

    async def start(self) -> None:
        await self.close()
        self._actor = self._actor_class.remote(*self._arguments)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                self.pid = await self._actor.start.remote()
        except TimeoutError:
            raise WorkerLost(f"{self.name} found no room on the cluster in {_READY_SECONDS / 60:g} minutes") from None
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"{self.name} could not start ({_first_line(error)})") from None

    async def ask(self, item: Item) -> Answer:
        if self._actor is None:
            raise WorkerLost(f"{self.name} has ended", during=False)
        try:
            status, body = await self._actor.ask.remote(without_model(item.body))
        except self._ray.exceptions.RayTaskError as error:  # of the engine, which goes on
            message = f"the engine failed: {_first_line(error.cause or error)}"
            return Answer(500, {"error": {"code": "engine_failed", "message": message}})
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(f"{self.name} was lost ({_first_line(error)})") from None
        return Answer(status, body)

    async def close(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
            self._actor = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _local_http(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)


def without_model(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body without the name of a model: an engine has one, whatever the manifest calls it."""
    return {name: value for name, value in body.items() if name != "model"}


def with_files(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with our files inside it, as data URLs in OpenAI's form. Blocks. `KeyeError` for too large a file."""
    sent = copy.deepcopy(dict(body))
    for holder, key, kind in media_places(sent):
        name = holder[key]
        if name.startswith("/") or name[:5].lower() == "file:":
            name = _data_url(name, kind)
        if key == kind:  # our short form, {"type": "video", "video": NAME, ...}
            options = {option: value for option, value in holder.items() if option not in ("type", kind)}
            holder.clear()
            holder |= {"type": f"{kind}_url", f"{kind}_url": {"url": name, **options}}
        else:
            holder[key] = name
    return sent


def _data_url(name: str, kind: str) -> str:
    source = fetch_source(name)
    if source.size > INLINE_BYTES:
        raise KeyeError(
            f"{source.name} has {format_bytes(source.size)}, more than the {format_bytes(INLINE_BYTES)} that are sent "
            "with a question: give its address, the id of an upload, or ask without --server"
        )
    guessed = mimetypes.guess_type(source.name)[0] or ""
    declared = guessed if guessed.startswith(kind) else {"video": "video/mp4", "image": "image/jpeg"}[kind]
    with source.open() as file:
        return f"data:{declared};base64,{base64.b64encode(file.read()).decode()}"


def _server_root(url: str) -> str:
    """The beginning of a server's addresses, before /v1."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise KeyeError(f"{url!r} is not the address of a server: give one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _json_object(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json(parse_constant=lambda _: None, parse_float=_parse_float)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return {"error": {"message": f"the server answered {answer.status_code} with something that is not a JSON object"}}


def _parse_float(text: str) -> float | None:
    """None for a number that JSON cannot express."""
    number = float(text)
    return number if math.isfinite(number) else None


def retry_wait(attempt: int, retry_after: str = "") -> float:
    """Seconds until another try: what the server says, else 0.5, 1, 2 ..., with jitter."""
    seconds = float(retry_after) if _SECONDS.fullmatch(retry_after) else 2.0**attempt / 2
    return min(seconds, _LONGEST_WAIT) * random.uniform(0.8, 1.2)
