"""Who answers the questions of a batch: OpenAI-compatible servers, the engine in this process, engines in processes of
their own. All of them take the body of a chat completion and give its answer; `ask` is the same for all.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
import mimetypes
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import httpx

from keye.batch.manifest import Item, media_places
from keye.errors import KeyeError
from keye.media.source.fetch import fetch_source
from keye.server.folders import BATCH_PREFIX, ServerFolder

if TYPE_CHECKING:
    from fastapi import FastAPI

    from keye.api import Keye

_ROUTE: Final = "/v1/chat/completions"
#: Largest file that is sent inside a request, in bytes: a body of keye serve may have 64 MiB, and base64 adds a third.
INLINE_BYTES: Final = 45 << 20
#: Statuses after which the same request may succeed.
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Longest wait before another try, in seconds.
_LONGEST_WAIT: Final = 30.0
#: Seconds in which a server must give its answer unless something else is said, accept a connection, and say which
#: models it has.
ANSWER_SECONDS: Final = 3600.0
_CONNECT_SECONDS: Final = 10.0
_MODELS_SECONDS: Final = 30.0
#: A wait in seconds as servers tell it; they may also name a date.
_SECONDS: Final = re.compile("[0-9]{1,9}")
#: A day: in a batch a long video may take as long as it needs.
_REQUEST_SECONDS: Final = 24 * 3600.0


class WorkerLost(KeyeError):
    """A worker does not answer any more. `during` says that it was lost while it worked on the question."""

    def __init__(self, sentence: str, *, during: bool = True) -> None:
        super().__init__(sentence)
        self.during = during


@dataclass(frozen=True)
class Answer:
    """What came back: a status of HTTP and the object with it."""

    status: int
    body: Mapping[str, Any]


class Worker(Protocol):
    """`slots` questions may be under way at once. `start` makes it ready, also anew after it was lost; `WorkerLost`
    where it cannot be. `close` ends it; both may be called again."""

    name: str
    slots: int

    async def start(self) -> None: ...

    async def ask(self, item: Item) -> Answer:
        """The answer, good or bad; `WorkerLost` where there is none, `KeyeError` for media that cannot be sent."""

    async def close(self) -> None: ...


class Client:
    """Posts questions to an application, over a socket or in this process. `tries` of each request, in each of which
    the answer must be complete after `seconds`; `inline` for one that cannot open our files: they are sent with the
    question."""

    def __init__(
        self, http: httpx.AsyncClient, name: str, *, tries: int = 1, inline: bool = False, seconds: float | None = None
    ) -> None:
        self.http, self.name, self.tries, self.inline, self.seconds = http, name, tries, inline, seconds

    async def post(self, body: Mapping[str, Any]) -> Answer:
        """One chat completion. Full or failing servers are asked again, after as long as they say or twice as long each
        time."""
        sent = await asyncio.to_thread(_encoded, body, self.inline)
        for attempt in range(self.tries):
            last = attempt == self.tries - 1
            try:
                async with asyncio.timeout(self.seconds):
                    answer = await self.http.post(_ROUTE, content=sent, headers={"Content-Type": "application/json"})
            except TimeoutError:  # another try would take as long
                raise WorkerLost(f"{self.name} gave no answer in {self.seconds:g} s") from None
            except httpx.DecodingError:
                return _unreadable("the server's answer is not compressed as it says")
            except httpx.TransportError as error:
                if last:
                    unmet = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                    raise WorkerLost(f"{self.name} does not answer ({_told(error)})", during=not unmet) from None
                await _wait(attempt, None)
                continue
            except RuntimeError:
                if not self.http.is_closed:
                    raise
                raise WorkerLost(f"{self.name} was closed", during=False) from None
            if answer.status_code not in _AGAIN or last:
                return Answer(answer.status_code, _object(answer))
            await _wait(attempt, answer.headers.get("retry-after"))
        raise AssertionError("there is at least one try")


class ServerWorker:
    """Any OpenAI-compatible server, which has `seconds` for an answer. `model` is what it calls its model; asked for
    where it is not given."""

    def __init__(
        self, url: str, *, model: str | None, key: str | None, slots: int, tries: int, seconds: float = ANSWER_SECONDS
    ) -> None:
        self.name, self.slots, self.model = url, slots, model
        address = _address(url)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=slots, max_keepalive_connections=slots)
        times = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._http = httpx.AsyncClient(base_url=address, headers=headers, limits=limits, timeout=times)
        self._client = Client(self._http, self.name, tries=tries, inline=True, seconds=seconds)
        self._tries = tries

    async def start(self) -> None:
        """Asks for its models: whether it is there, and takes our key."""
        for attempt in range(self._tries):
            try:
                async with asyncio.timeout(_MODELS_SECONDS):
                    answer = await self._http.get("/v1/models")
            except (httpx.RequestError, TimeoutError) as error:
                if attempt == self._tries - 1:
                    raise WorkerLost(f"{self.name} cannot be reached ({_told(error)}): check --server") from None
                await _wait(attempt, None)
                continue
            if answer.status_code in (401, 403):
                raise KeyeError(f"{self.name} wants another key: set KEYE_API_KEY to one that it takes")
            if answer.status_code not in _AGAIN or attempt == self._tries - 1:
                break
            await _wait(attempt, answer.headers.get("retry-after"))
        listed = _object(answer).get("data")
        if self.model is None:
            first = listed[0] if isinstance(listed, list) and listed else None
            if answer.status_code != 200 or not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise KeyeError(f"{self.name} lists no models at /v1/models: check --server, or name one with --model")
            self.model = first["id"]

    async def ask(self, item: Item) -> Answer:
        return await self._client.post({"model": self.model, **item.body})

    async def close(self) -> None:
        await self._http.aclose()


class EngineWorker:
    """The engine in this process, which opens the files of its owner; `private` addresses too."""

    def __init__(self, model: Keye, *, slots: int, private: bool = False, name: str = "engine") -> None:
        self.name, self.slots, self._model, self._private = name, slots, model, private
        self._open = AsyncExitStack()
        self._client: Client | None = None

    async def start(self) -> None:
        if self._client is not None:
            return
        app = local_app(self._model, self.slots, private=self._private)
        await self._open.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)
        self._client = Client(await self._open.enter_async_context(http), self.name)

    async def ask(self, item: Item) -> Answer:
        return await self.post(item.body)

    async def post(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a body."""
        assert self._client is not None, "the worker was not started"
        return await self._client.post(own_model(body))

    async def close(self) -> None:
        await self._open.aclose()


class ProcessWorker:
    """An engine in a process of its own (`keye.batch.child`), which is started anew when it is lost and ends
    with this one. `settings` are arguments of `keye.load`, `model` among them, and `threads`."""

    def __init__(self, settings: Mapping[str, Any], *, slots: int, private: bool = False, name: str) -> None:
        self.name, self.slots, self._settings, self._private = name, slots, settings, private
        self._home = ServerFolder(BATCH_PREFIX)  # only this user may enter it, and use the socket
        self._folder = self._home.path
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        await self._stop()
        socket = self._folder / "engine"
        socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "keye.batch.child"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # Ctrl-C in the terminal is ours to handle
        assert self._process.stdin is not None and self._process.stdout is not None
        told = {
            "settings": dict(self._settings), "slots": self.slots, "private": self._private, "socket": str(socket),
            "folder": str(self._folder),  # what it leaves there when it is killed goes with ours
        }  # fmt: skip
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        if await asyncio.to_thread(self._process.stdout.readline) != b"ready\n":
            raise WorkerLost(f"{self.name} could not start; what it told stands above")
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)
        self._client = Client(http, self.name)

    async def ask(self, item: Item) -> Answer:
        if self._client is None:
            raise WorkerLost(f"{self.name} has ended", during=False)
        return await self._client.post(own_model(item.body))

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
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def local_app(model: Keye, slots: int, *, private: bool = False) -> FastAPI:
    """The application of `keye serve` for the owner of this machine: it opens files by their paths, and addresses of
    local networks where they are `private`. Whoever reaches it can read what this user can, so it must not listen where
    others are."""
    from keye.media.source.download import FetchLimits
    from keye.media.source.fetch import OwnersPolicy
    from keye.server.app import create_app
    from keye.server.settings import Settings

    settings = Settings(queue=max(slots, 1), request_seconds=_REQUEST_SECONDS, drain_seconds=0.0)
    return create_app(model, settings, policy=OwnersPolicy(limits=FetchLimits(allow_private=private)))


def own_model(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body without the name of a model: there is one, whatever a manifest that was made for others calls it."""
    return {name: value for name, value in body.items() if name != "model"}


def _encoded(body: Mapping[str, Any], inline: bool) -> bytes:
    return json.dumps(with_files(body) if inline else body).encode()


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
            f"{source.name} has {source.size / 2**20:,.0f} MiB, more than the {INLINE_BYTES >> 20} MiB that are sent "
            "with a question: give its address, the id of an upload, or ask without --server"
        )
    guessed = mimetypes.guess_type(source.name)[0] or ""
    declared = guessed if guessed.startswith(kind) else {"video": "video/mp4", "image": "image/jpeg"}[kind]
    with source.open() as file:
        return f"data:{declared};base64,{base64.b64encode(file.read()).decode()}"


def _address(url: str) -> str:
    """The beginning of a server's addresses, before /v1."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise KeyeError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json(parse_constant=lambda _: None, parse_float=_number)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return {"error": {"message": f"the server answered {answer.status_code} with something that is not a JSON object"}}


def _number(text: str) -> float | None:
    """None for what no number in JSON can be written as again."""
    number = float(text)
    return number if math.isfinite(number) else None


def _unreadable(message: str) -> Answer:
    return Answer(502, {"error": {"code": "bad_answer", "message": message}})


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _wait(attempt: int, told: str | None) -> None:
    """Until another try: what the server has said, else 0.5, 1, 2 ... seconds, spread so that not all come at once."""
    seconds = float(told) if told is not None and _SECONDS.fullmatch(told) else 2.0**attempt / 2
    await asyncio.sleep(min(seconds, _LONGEST_WAIT) * random.uniform(0.8, 1.2))
