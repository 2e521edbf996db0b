"""Every attack is refused with a sentence that gives nothing away, and its twin passes: by a stand-in behind the guard,
and by the application itself where it is installed."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from keye.server.edge.guard import Guard, GuardSettings
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Limits
from tests.support.asgi import KEY, App, Ask, Reply, requested, send
from tests.support.attack_cases import (
    NOTED,
    Case,
    cases,
    chat,
    data_url,
    encoded,
    gif_of_many_pictures,
    image,
    png_with_text_bomb,
    video,
)
from tests.support.stub_app import stub_app

CASES = cases()
#: Addresses of memory, paths of ours, traces, names and versions of libraries: what no reply may hold.
LEAK = re.compile(rb"\b0x[0-9a-f]{4}|/(?:usr|work|root|home|tmp|opt)/|\.py\b|Traceback|site-packages|libav|<_io|Pillow")


def guarded(app: App) -> Guard:
    limits = Limits(requests_per_second=1e6, burst=1e6)
    return Guard(app, GuardSettings(Keyring.of({"tests": KEY}), limits=limits))


def check_refused(case: Case, reply: Reply) -> None:
    assert reply.status in case.statuses, reply.body[:500]
    assert not LEAK.search(reply.body), reply.body
    if reply.status >= 400 and case.attack.method != "HEAD":
        error = reply.error
        assert error["message"]
        assert len(error["message"]) <= 2000


def check_passed(reply: Reply) -> None:
    assert reply.status == 200, reply.body[:500]


STUB_CASES = [case for case in CASES if not case.app_only]


@pytest.mark.parametrize("case", STUB_CASES, ids=[f"{case.number} {case.name}" for case in STUB_CASES])
def test_attack_on_the_guard(case: Case) -> None:
    check_refused(case, send(guarded(stub_app), case.attack))


@pytest.mark.parametrize("number", sorted({case.number for case in STUB_CASES}))
def test_twins_pass_the_guard(number: int) -> None:
    for twin in {repr(case.twin): case.twin for case in STUB_CASES if case.number == number}.values():
        check_passed(send(guarded(stub_app), twin))


def test_animations_and_text_of_great_length_cost_no_more_than_the_limits() -> None:
    # Not refused: of an image only the first picture is decoded, and text that unpacks is bounded by Pillow.
    many = gif_of_many_pictures(50_000)
    assert send(guarded(stub_app), chat(image(data_url(many, "image/gif")))).status == 200
    reply = send(guarded(stub_app), chat(video(data_url(many, "image/gif"))))
    assert reply.status in (200, 400)
    assert send(guarded(stub_app), chat(image(data_url(png_with_text_bomb(10**8), "image/png")))).status in (200, 400)
    assert send(guarded(stub_app), chat(image(data_url(encoded("PNG"), "image/png")))).status == 200


class Served:
    """An application with its lifespan, in a loop of its own."""

    def __init__(self, app: App) -> None:
        self.app, self.loop = app, asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._events: asyncio.Queue[dict[str, Any]] = self._do(self._queue())
        self._sent: asyncio.Queue[dict[str, Any]] = self._do(self._queue())
        self._events_put("lifespan.startup")
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._life = asyncio.run_coroutine_threadsafe(app(scope, self._events.get, self._sent.put), self.loop)
        assert self._do(self._sent.get())["type"] == "lifespan.startup.complete"

    def send(self, ask: Ask) -> Reply:
        reply = self._do(requested(self.app, ask))
        assert isinstance(reply, Reply)
        return reply

    def close(self) -> None:
        self._events_put("lifespan.shutdown")
        self._life.result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def _events_put(self, kind: str) -> None:
        self._do(self._events.put({"type": kind}))

    @staticmethod
    async def _queue() -> asyncio.Queue[dict[str, Any]]:
        return asyncio.Queue()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The application with keye-nano, behind the guard."""
    if find_spec("keye.server.app") is None:
        pytest.skip("keye.server.app is not here yet")
    import keye
    from keye.server.app import create_app
    from keye.server.settings import Settings

    served = Served(guarded(create_app(keye.load("nano"), Settings(keys={"tests": KEY}))))
    yield served
    served.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f"{case.number} {case.name}" for case in CASES])
def test_attack_on_the_application(served: Served, case: Case) -> None:
    reply = served.send(case.attack)
    check_refused(case, reply)
    if case.statuses is NOTED:
        assert "ignored" in " ".join(reply.json()["keye"]["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted({case.number for case in CASES}))
def test_twins_pass_the_application(served: Served, number: int) -> None:
    for twin in {repr(case.twin): case.twin for case in CASES if case.number == number}.values():
        check_passed(served.send(twin))


@pytest.mark.slow
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>", "<|image_pad|>"])
def test_special_tokens_in_text_stay_text(served: Served, token: str) -> None:
    # A control token would be one token of the prompt; as text it is several.
    def count(text: str) -> int:
        reply = served.send(chat({"type": "text", "text": text}))
        check_passed(reply)
        return int(reply.json()["usage"]["prompt_tokens"])

    assert count(token * 10) - count("") >= 30


@pytest.mark.slow
def test_files_of_one_key_are_not_found_by_another(served: Served) -> None:
    boundary = "limit"
    body = (f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nmedia\r\n--{boundary}\r\n'
            'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
            ).encode() + encoded("PNG") + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    kind = f"multipart/form-data; boundary={boundary}"
    reply = served.send(Ask("POST", "/v1/files", body=body, content_type=kind))
    check_passed(reply)
    name = reply.json()["id"]
    assert len(name) >= 20
    check_passed(served.send(Ask("GET", f"/v1/files/{name}")))
    other = "another-key-0123456789"
    # The same application behind a guard that knows the other key.
    inner = getattr(served.app, "app")  # noqa: B009 - ASGI callables have no common class
    untrusted = Guard(inner, GuardSettings(Keyring.of({"untrusted": other})))
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert served._do(requested(untrusted, Ask("GET", path, key=other))).status == 404
