"""What the guard lets through and what it does not, at the level of requests."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from keye.server.edge.audit import Audit
from keye.server.edge.guard import Guard, GuardSettings
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Limits
from keye.server.edge.request_head import PAGE_CSP
from tests.support.asgi import HOST, KEY, Ask, post, requested, run, send
from tests.support.stub_app import stub_app

HELLO = {"model": "nano", "messages": [{"role": "user", "content": "hello"}]}


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def guard(app: Any = stub_app, clock: Any = None, lines: list[str] | None = None, **fields: Any) -> Guard:
    limits = fields.pop("limits", Limits())
    settings = GuardSettings(keys=Keyring.of({"tests": KEY, "others": "x" * 20}), limits=limits, **fields)
    audit = Audit(lines.append) if lines is not None else None
    return Guard(app, settings, audit=audit, **({"clock": clock} if clock else {}))


def test_a_request_with_a_key_passes() -> None:
    reply = send(guard(), post(HELLO))
    assert (reply.status, reply.json()["key"]) == (200, "tests")
    assert send(guard(), post(HELLO, key="x" * 20)).json()["key"] == "others"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/v1/files", "/metrics", "/openapi.json", "/docs", "/tokenize",
             "/v1/models/", "/healthy", "/health/", "/static", "/staticfiles/x", "/v1/files/../../health", "//health",
             "/v1/live/x/frames", "/anything", "/v1/messages", "/v1/responses/resp_1", "/generate", "/ping/",
             "/version", "/get_model_info", "/health_generate", "/load"],
)  # fmt: skip
def test_every_path_needs_a_key(path: str, method: str) -> None:
    assert send(guard(), Ask(method, path, key=None)).status in (400, 401)


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/static/app.js"])
def test_the_page_and_the_health_check_do_not(path: str) -> None:
    assert send(guard(), Ask("GET", path, key=None)).status == 200
    assert send(guard(), Ask("HEAD", path, key=None)).status == 200
    assert send(guard(), Ask("POST", path, body=b"x" * 10, key=None)).status == 405


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}", f"Basic {KEY}", KEY,
     f"Bearer {KEY} x", "Bearer \u00e9\u00e9\u00e9", f"Bearer {KEY},{KEY}", f"Bearer\t{KEY}"],
)  # fmt: skip
def test_wrong_keys(authorization: str) -> None:
    reply = send(guard(), Ask(headers=(("Authorization", authorization),)))
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.error["code"] == "invalid_api_key"


def test_a_key_may_stand_in_the_header_of_anthropics_clients() -> None:
    for key, status in ((KEY, 200), (KEY[:-1], 401), ("", 401)):
        assert send(guard(), Ask(headers=(("X-Api-Key", key),), key=None)).status == status
    twice = Ask(headers=(("x-api-key", KEY), ("x-api-key", f"{KEY}x")), key=None)
    assert send(guard(), twice).status == 400
    wrong_first = Ask(headers=(("authorization", "Bearer wrong"), ("x-api-key", KEY)))
    assert send(guard(), wrong_first).status == 401


def test_refusals_below_v1_messages_have_anthropics_shape() -> None:
    reply = send(guard(), post({}, path="/v1/messages", key=None))
    assert reply.status == 401 and reply.json()["type"] == "error"
    assert reply.error["type"] == "authentication_error" and reply.error["message"]


def test_the_scheme_of_a_key_may_be_written_in_any_case() -> None:
    assert send(guard(), Ask(headers=(("authorization", f"bearer {KEY}"),))).status == 200


def test_a_key_elsewhere_does_not_count() -> None:
    for ask in (Ask(key=None, query=f"api_key={KEY}"), Ask(key=None, headers=(("api-key", KEY),))):
        assert send(guard(), ask).status == 401


def test_two_authorization_headers_are_refused() -> None:
    both = (("authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other"))
    assert send(guard(), Ask(headers=both)).error["code"] == "repeated_header"


def test_without_keys_everybody_is_local() -> None:
    reply = send(Guard(stub_app, GuardSettings()), post(HELLO, key=None))
    assert (reply.status, reply.json()["key"]) == (200, "local")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "box"])
def test_hosts_that_are_this_server(host: str) -> None:
    assert send(guard(hosts=("box",)), Ask(headers=(("Host", host),))).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("2130706433", 403),
     ("0x7f.1", 403), ("", 400), ("localhost:8000@evil", 400), ("local host", 400), ("a:b:c", 400),
     ("localhost:", 400)],
)  # fmt: skip
def test_other_hosts_are_refused(host: str, status: int) -> None:
    assert send(guard(hosts=("box",)), Ask(headers=(("Host", host),))).status == status


def test_the_page_itself_and_programs_may_ask() -> None:
    assert send(guard(), Ask(headers=(("Origin", f"http://{HOST}"),))).status == 200
    assert send(guard(), Ask(headers=(("Sec-Fetch-Site", "same-origin"),))).status == 200
    assert send(guard(), Ask("GET", "/", headers=(("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")))
                ).status == 200  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        (("Origin", "https://evil.example"),),
        (("Origin", "null"),),
        (("Origin", "http://127.0.0.1:9000"),),
        (("Origin", "http://localhost:8000"),),  # another name of the same server is another origin to a browser
        (("Sec-Fetch-Site", "cross-site"),),
        (("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "no-cors")),
        (("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")),
    ],
)
def test_other_web_pages_may_not(headers: tuple[tuple[str, str], ...]) -> None:
    reply = send(guard(), Ask(headers=headers))
    assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in reply.headers


def test_a_configured_page_may() -> None:
    app = guard(origins=("https://app.example",))
    reply = send(app, Ask(headers=(("Origin", "https://app.example"), ("Sec-Fetch-Site", "cross-site"))))
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    asks = (("Origin", "https://app.example"), ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization, x-stainless-os"))  # fmt: skip
    reply = send(app, Ask("OPTIONS", "/v1/chat/completions", headers=asks, key=None))
    assert (reply.status, reply.headers["access-control-allow-headers"]) == (204, "authorization, x-stainless-os")
    assert "access-control-allow-credentials" not in reply.headers
    assert send(guard(), Ask("OPTIONS", "/v1/chat/completions", headers=asks, key=None)).status == 403


@pytest.mark.parametrize(
    "path", ["/v1//models", "/v1/./models", "/v1/../v1/models", "/v1/mod\u00e9ls", "/v1/models\r\nx: y", "v1/models",
             "http://evil.example/v1/models", "/v1/mod els", "/v1\\models", "/" + "a" * 600],
)  # fmt: skip
def test_paths_that_are_not_plain(path: str) -> None:
    assert send(guard(), Ask("GET", path)).status == 400


def test_escaped_paths_are_refused_as_they_come_in() -> None:
    assert send(guard(), Ask("GET", "/v1/models", raw_path="/v1%2fmodels")).status == 400
    assert send(guard(), Ask("GET", "/v1/files/file-abc.mp4")).status == 404


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "CONNECT", "get", "X" * 50])
def test_methods_that_are_not_served(method: str) -> None:
    assert send(guard(), Ask(method)).status == 405


def test_headers_are_limited_in_number_and_size() -> None:
    few, many = ((f"x-{i}", "y") for i in range(30)), ((f"x-{i}", "y") for i in range(100))
    assert send(guard(), Ask(headers=tuple(few))).status == 200
    assert send(guard(), Ask(headers=tuple(many))).status == 431
    assert send(guard(), Ask(headers=(("x", "y" * 2**20),))).status == 431
    assert send(guard(), Ask(query="a" * 5000)).status == 400


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (post(HELLO, headers=(("Content-Encoding", "gzip"),)), 415),
        (post(HELLO, content_type="text/plain"), 415),
        (post(HELLO, content_type="application/x-www-form-urlencoded"), 415),
        (post(HELLO, content_type=""), 415),
        (post(HELLO, length=10**9), 413),
        (post(HELLO, headers=(("Content-Length", "-1"),)), 400),
        (post(HELLO, headers=(("Content-Length", "1e3"),)), 400),
        (post(HELLO, headers=(("Content-Length", "5"), ("Transfer-Encoding", "chunked"))), 400),
        (post(HELLO, headers=(("Content-Length", "5"), ("Content-Length", "6"))), 400),
        (Ask("GET", body=b"{}"), 400),
        (Ask("DELETE", "/v1/files/x", body=b"{}"), 400),
        (Ask("GET", chunked=True), 400),
        (Ask("POST", "/v1/files", body=b"{}"), 415),
        (Ask("POST", "/v1/files", body=b"x" * 2000, content_type="multipart/form-data; boundary=b"), 413),
        (Ask("POST", "/v1/files", body=[b"x" * 600] * 3, content_type="multipart/form-data", chunked=True), 413),
        (post(b"[" + b" " * 5000 + b"]", chunked=True), 413),
    ],
)
def test_bodies_that_are_refused(ask: Ask, status: int) -> None:
    reply = send(guard(limits=Limits(json_bytes=4000, upload_bytes=1000)), ask)
    assert reply.status == status
    assert reply.error["message"]
    assert reply.headers["connection"] == "close"


def test_bodies_that_pass() -> None:
    app = guard(limits=Limits(json_bytes=4000, upload_bytes=1000))
    assert send(app, post(HELLO, chunked=True)).status == 200
    assert send(app, post(HELLO, content_type="application/json; charset=utf-8")).status == 200
    complete = json.dumps(HELLO).encode()
    assert send(app, replace(post(HELLO), body=[complete[i : i + 7] for i in range(0, len(complete), 7)])).status == 200
    upload = Ask("POST", "/v1/files", body=[b"x" * 300] * 3, content_type="multipart/form-data; boundary=b")
    assert send(app, upload).json()["bytes"] == 900


def test_a_large_body_is_checked_beside_the_loop() -> None:
    big = {"messages": [{"role": "user", "content": "a" * 400_000}]}
    assert send(guard(), post(big)).status == 200
    assert send(guard(), post(json.dumps(big).encode()[:-1])).error["code"] == "invalid_json"


def test_an_application_that_swallows_a_refusal_does_not_answer_in_its_place() -> None:
    async def forgiving(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except Exception:  # noqa: BLE001 (as frameworks do)
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"secret"})

    ask = Ask("POST", "/v1/files", body=b"x" * 2000, content_type="multipart/form-data", chunked=True)
    reply = send(guard(forgiving, limits=Limits(upload_bytes=1000)), ask)
    assert (reply.status, b"secret" in reply.body) == (413, False)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
def test_a_body_that_comes_too_slowly(path: str) -> None:
    kind = "multipart/form-data" if path == "/v1/files" else "application/json"
    ask = Ask("POST", path, body=[b'{"a"'], content_type=kind, length=100, stalls=True)
    reply = send(guard(limits=Limits(idle_seconds=0.0)), ask)
    assert (reply.status, reply.error["code"]) == (408, "slow_body")


def test_a_body_that_drips() -> None:
    # Each piece comes in time, and still the whole is slower than a byte a second may be.
    clock = Clock()

    async def dripping() -> int:
        app = guard(clock=clock, limits=Limits(grace_seconds=5.0, json_rate=1.0))
        status: list[int] = []
        sent = 0

        async def receive() -> dict[str, Any]:
            nonlocal sent
            clock.now += 2.0
            sent += 1
            return {"type": "http.request", "body": b"[" if sent == 1 else b" ", "more_body": True}

        async def record(message: dict[str, Any]) -> None:
            status.append(message.get("status", 0))

        await app(Ask("POST", "/v1/chat/completions", body=b"x" * 100).scope(), receive, record)
        assert sent < 10
        return status[0]

    assert run(dripping()) == 408


def test_a_client_that_does_not_take_the_answer() -> None:
    async def talks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def never(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    app = guard(talks, limits=Limits(send_seconds=0.0))
    with pytest.raises(TimeoutError):
        run(app(Ask().scope(), receive, never))
    assert app.running.total == 0


def test_requests_too_often() -> None:
    clock = Clock()
    app = guard(clock=clock, limits=Limits(requests_per_second=0.5, burst=3.0))
    assert [send(app, Ask()).status for _ in range(4)] == [200, 200, 200, 429]
    reply = send(app, Ask())
    assert (reply.error["code"], reply.headers["retry-after"]) == ("rate_limited", "2")
    assert send(app, Ask("GET", "/health", key=None)).status == 200
    assert send(app, Ask("GET", "/metrics")).status == 200
    clock.now += 2.0
    assert send(app, Ask()).status == 200


def test_one_key_does_not_use_up_the_rate_of_another() -> None:
    app = guard(clock=Clock(), limits=Limits(requests_per_second=0.5, burst=2.0))
    assert [send(app, Ask(client="10.0.0.1")).status for _ in range(3)] == [200, 200, 429]
    assert send(app, Ask(client="10.0.0.2", key="x" * 20)).status == 200
    # Behind a proxy both come from one address.
    assert send(app, Ask(client="10.0.0.1", key="x" * 20)).status == 200


def test_wrong_keys_are_slowed_down() -> None:
    app = guard(clock=Clock(), limits=Limits(requests_per_second=0.1, burst=20.0))
    assert [send(app, Ask(key="wrong")).status for _ in range(3)] == [401, 401, 429]
    assert send(app, Ask()).status == 200


def test_too_many_at_once() -> None:
    async def crowd() -> None:
        release = asyncio.Event()

        async def waits(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/chat/completions":
                await release.wait()
            await stub_app(scope, receive, send)

        app = guard(waits, limits=Limits(running=3, running_per_key=2))
        first = [asyncio.create_task(requested(app, post(HELLO))) for _ in range(2)]
        while app.running.total < 2:
            await asyncio.sleep(0)
        reply = await requested(app, post(HELLO))
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "too_many_running", "1")
        other = asyncio.create_task(requested(app, post(HELLO, key="x" * 20)))
        while app.running.total < 3:
            await asyncio.sleep(0)
        assert (await requested(app, Ask(key="x" * 20))).status == 429
        for path in ("/health", "/metrics"):
            assert (await requested(app, Ask("GET", path))).status == 200
        release.set()
        assert [(await task).status for task in (*first, other)] == [200] * 3
        assert app.running.total == 0
        assert (await requested(app, post(HELLO))).status == 200

    run(crowd())


def test_a_thousand_clients_that_leave() -> None:
    async def crowd() -> None:
        app = guard(limits=Limits(requests_per_second=1e6, burst=1e6))
        asks = [
            post(HELLO, leaves=True),
            Ask("POST", "/v1/chat/completions", body=[b'{"a'], length=50, leaves=True),
            Ask("POST", "/v1/files", body=[b"x"], length=50, leaves=True, content_type="multipart/form-data"),
        ]
        for i in range(1000):
            await requested(app, asks[i % 3])
        assert app.running.total == 0
        assert app.buffered_bytes == 0

    run(crowd())


def test_memory_for_bodies_is_limited_over_all_requests() -> None:
    async def crowd() -> None:
        app = guard(limits=Limits(buffered_bytes=1000))
        half = Ask("POST", "/v1/chat/completions", body=[b'"' + b"a" * 600], length=700, stalls=True)
        reserved = asyncio.create_task(requested(app, half))
        while app.buffered_bytes < 600:
            await asyncio.sleep(0)
        reply = await requested(app, post({"messages": [], "x": "a" * 600}))
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")
        reserved.cancel()
        await asyncio.gather(reserved, return_exceptions=True)
        assert app.buffered_bytes == 0
        assert (await requested(app, post({"messages": [], "x": "a" * 600}))).status == 200

    run(crowd())


def test_answers_are_dressed() -> None:
    page, data = send(guard(), Ask("GET", "/", key=None)), send(guard(), Ask())
    assert page.headers["content-security-policy"] == PAGE_CSP
    assert "sandbox" in data.headers["content-security-policy"]
    assert (page.headers["cache-control"], data.headers["cache-control"]) == ("no-cache", "no-store")
    for headers in (page.headers, data.headers, send(guard(), Ask(key=None)).headers):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"].startswith("req-")
        assert not {"server", "x-powered-by", "access-control-allow-origin"} & set(headers)


def test_the_audit_log_says_who_and_how_much_but_not_what() -> None:
    async def counts(scope: Any, receive: Any, send: Any) -> None:
        scope["keye.request"].prompt_tokens, scope["keye.request"].completion_tokens = 12, 3
        await stub_app(scope, receive, send)

    lines: list[str] = []
    app = guard(counts, lines=lines)
    send(app, post({"messages": [{"role": "user", "content": "my secret"}]}, query="token=hidden"))
    send(app, Ask(key="wrong-key-wrong-key"))
    send(app, Ask("GET", '/v1/models\n{"key":"forged"}', key=None))
    assert len(lines) == 3
    assert all(line.count("\n") == 1 and line.isascii() for line in lines)
    first, second, third = map(json.loads, lines)
    assert (first["key"], first["status"], first["path"]) == ("tests", 200, "/v1/chat/completions")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (12, 3)
    assert first["bytes_in"] > 0
    assert first["bytes_out"] > 0
    assert (second["key"], second["status"], second["code"]) == ("", 401, "invalid_api_key")
    assert (third["key"], third["status"]) == ("", 400)
    for secret in ("secret", "hidden", "wrong-key", KEY):
        assert secret not in "".join(lines)


def test_a_defect_of_the_application_is_logged_and_passed_on() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a defect")

    lines: list[str] = []
    app = guard(broken, lines=lines)
    with pytest.raises(RuntimeError):
        send(app, Ask())
    assert json.loads(lines[0])["status"] == 0
    assert app.running.total == 0


def test_websockets_are_closed_and_the_lifespan_passes() -> None:
    seen: list[Any] = []

    async def records(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def sent(message: Any) -> None:
        seen.append(message["type"])

    run(guard(records)({"type": "websocket", "path": "/"}, receive, sent))
    run(guard(records)({"type": "lifespan"}, receive, sent))
    assert seen == ["websocket.close", "lifespan"]
