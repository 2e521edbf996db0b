"""Requests made from the server's own description, valid and not, and good requests with something odd in them.

    python -m benchmarks.api_fuzz --cases 2000

`keye serve` with keye-nano in a process of its own. At most two thirds of the cases are schemathesis' over the server's
schema, half of them meant to be valid; the others are real requests in which one to three values were replaced. No
answer may have a status of 500 or more (503 with Retry-After is the server's own), each error is an error object, and
the server lives at the end. Prints JSON; the exit status is 1 where any of that does not hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

DEMO = Path(__file__).parents[1] / "src/keye/assets/demo.mp4"
#: Most tokens of a reply: what is asked is the question here, not how long the answer is.
REPLY = 4
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1e308, "", " ", "\x00", "\ud800", "ü" * 300, "null", "file-",
    "index-x", "data:", "data:video/mp4;base64,AAAA", "data:image/png;base64,", "http://127.0.0.1/x", "../etc/passwd",
    [], {}, [[]], [None], {"": {}}, {"type": "video_url"}, {"url": "file-0"}, [{"role": "user"}], list(range(100)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="(the output is always JSON)")
    options = parser.parse_args()
    begin, seen = time.perf_counter(), Seen()
    with server() as url:
        good = real_requests(*made_before(url))  # the cases of schemathesis may leave no room for them
        from_schema(url, seen, 2 * options.cases // 3, options.seed)
        schema_cases = seen.cases
        from_real(url, seen, good, options.cases - schema_cases, random.Random(options.seed))
        alive = httpx.get(f"{url}/health").status_code == 200
    bad = seen.failures or not alive
    print(json.dumps({
        "cases": seen.cases, "of_schemathesis": schema_cases, "statuses": dict(sorted(seen.statuses.items())),
        "failures": seen.failures[:10], "failed": len(seen.failures), "alive": alive,
        "seconds": round(time.perf_counter() - begin, 1),
    }, indent=2))  # fmt: skip
    return int(bool(bad))


@contextmanager
def server() -> Iterator[str]:
    """The address of a running `keye serve`, ended by SIGTERM."""
    command = [sys.executable, "-m", "keye", "serve", "nano", "--port", "0", "--threads", "1", "--max-seconds", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        result = re.search(r"http://\S+", process.stdout.readline())
        assert result is not None, "the server has not started"
        yield result[0]
    finally:
        process.terminate()
        process.wait(60)


class Seen:
    """What came back."""

    def __init__(self) -> None:
        self.cases, self.statuses, self.failures = 0, Counter[str](), list[str]()

    def check(self, what: str, status: int, body: bytes, retry: str | None) -> None:
        """Notes an answer, and what is wrong with it."""
        self.cases += 1
        self.statuses[str(status)] += 1
        if status >= 500 and not (status == 503 and retry):
            self.failures.append(f"{what}: status {status}: {body[:200]!r}")
        elif status >= 400:
            try:
                fine = isinstance(json.loads(body)["error"]["message"], str)
            except (ValueError, KeyError, TypeError):
                fine = what.startswith("HEAD")
            if not fine:
                self.failures.append(f"{what}: an error that is not an error object: {body[:200]!r}")


def short(body: Any) -> Any:
    """A body whose reply is short, where it says so in a valid way."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(body.get(name)) is int and body[name] > REPLY:
                body[name] = REPLY
        if {"messages", "prompt", "event", "question"} & body.keys():
            body.setdefault("max_tokens", REPLY)
        elif "input" in body:
            body.setdefault("max_output_tokens", REPLY)
    return body


def from_schema(url: str, seen: Seen, cases: int, number: int) -> None:
    """Cases of schemathesis, as many for each operation and for valid and invalid ones."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    kinds = [(operation, mode) for operation in operations for mode in modes]
    session = requests.Session()
    for place, (operation, mode) in enumerate(kinds):
        share = cases * (place + 1) // len(kinds) - cases * place // len(kinds)

        def ask(case: Any) -> None:
            if mode is GenerationMode.POSITIVE:  # noqa: B023 - called in this round
                case.body = short(case.body)
            try:
                answer = case.call(base_url=url, session=session, timeout=60)
            except (requests.exceptions.InvalidHeader, UnicodeError, requests.exceptions.InvalidURL):
                return  # no client could send it
            what = f"{case.method} {case.formatted_path}"
            retry = answer.headers.get("retry-after")
            seen.check(what, answer.status_code, answer.content, str(retry) if retry else None)

        run(operation.as_strategy(generation_mode=mode), ask, share, number)


def run(strategy: Any, ask: Callable[[Any], None], cases: int, number: int) -> None:
    """Draws and asks; an operation that has no invalid form has no such cases."""
    checks = list(HealthCheck)

    @seed(number)
    @settings(
        max_examples=max(1, cases), deadline=None, database=None, phases=[Phase.generate], suppress_health_check=checks
    )
    @given(strategy)
    def every(case: Any) -> None:
        ask(case)

    with suppress(Unsatisfiable):
        every()


def real_requests(file_id: str, index_id: str, live_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests that the server answers, of all routes that take JSON."""
    video = {"type": "video_url", "video_url": {"url": file_id, "max_frames": 4, "fps": 1}}
    index, words = {"type": "video_url", "video_url": {"url": index_id}}, {"type": "text", "text": "what is seen?"}
    request = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [video, words]}]
    numbers = {"type": "object", "properties": {"at": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "cut", "parameters": numbers}}]
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": numbers}}
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "n": 2}
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "keye": {"evidence": True, "progress": True}}
    output = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]

    def chat(content: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
        messages = content if isinstance(content[0], dict) and "role" in content[0] else None
        messages = messages or [{"role": "user", "content": content}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": REPLY, **fields}

    return [
        chat(request, model="nano", logprobs=True, top_logprobs=2, **drawn),
        chat(request, preprocess_kwargs={"max_frames": 2}, **streamed),
        chat([index, words]),
        chat("hi", tools=tools, tool_choice="auto"),
        chat("hi", response_format=form, chat_template_kwargs={"enable_thinking": False}),
        chat("hi", structured_outputs={"regex": "[a-c]+"}),
        ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": REPLY, "echo": True, "logprobs": 1, "n": 1}),
        ("/v1/responses", {"input": output, "instructions": "Be short.", "max_output_tokens": REPLY}),
        ("/v1/media/plan", {"content": [index, video], "preprocess_kwargs": {"fps": 1}}),
        ("/v1/video/ground", {"video": video, "event": "the red circle", "max_tokens": REPLY, "evidence": True}),
        ("/v1/clips", {"file_id": file_id, "intervals": [[0, 0.5], [1, 1.5]]}),
        ("/v1/indexes", {"file_id": file_id, "preprocess_kwargs": {"max_frames": 2}}),
        ("/v1/live", {"keep": "recent", "preprocess_kwargs": {"max_pixels": 12544}}),
        (f"/v1/live/{live_id}/frames", {"file_id": file_id, "offset": 0.0}),
        (f"/v1/live/{live_id}/ask", {"question": "what is seen?", "max_tokens": REPLY, "seed": 1}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "tools": tools}),
    ]


def made_before(url: str) -> tuple[str, str, str]:
    """The ids of an upload, an index and a live session."""
    with httpx.Client(base_url=url, timeout=60) as client:
        file_id = client.post("/v1/files", files={"file": ("demo.mp4", DEMO.read_bytes())}).json()["id"]
        result = {"file_id": file_id, "preprocess_kwargs": {"max_frames": 4}}
        index = client.post("/v1/indexes", json=result).json()
        return file_id, index["id"], client.post("/v1/live", json={}).json()["id"]


def from_real(url: str, seen: Seen, good: list[tuple[str, dict[str, Any]]], cases: int, rng: random.Random) -> None:
    """Good requests with odd values in the place of one to three of theirs."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(cases):
            path, body = rng.choice(good)
            changed = copy.deepcopy(body)
            for _ in range(rng.randint(1, 3)):
                spoil(changed, rng)
            data = json.dumps(changed, ensure_ascii=True).encode()
            answer = client.post(path, content=data, headers={"content-type": "application/json"})
            seen.check(
                f"POST {path} {data[:400]!r}", answer.status_code, answer.content, answer.headers.get("retry-after")
            )


def spoil(value: Any, rng: random.Random) -> None:
    """Replaces, adds or removes something somewhere in a JSON value."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    if not places:
        return
    inside, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del inside[key]
    elif what < 0.3 and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[key]))
    elif not (key in ("max_tokens", "max_output_tokens") and what < 0.9):
        inside[key] = copy.deepcopy(rng.choice(ODD))


if __name__ == "__main__":
    sys.exit(main())
