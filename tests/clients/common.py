"""What every client is tried with: the server's address, pictures, a video, a tool; and the report of a trial.

Runs in the environments of the clients, so it needs nothing but Python. A script registers its cases with `@case` and
ends with `report()`, which runs them, prints one line of JSON for each and a closing line as pytest has it.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import os
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL = os.environ.get("KEYE_URL", "http://127.0.0.1:8000")
API = f"{URL}/v1"
MODEL = "nano"
KEY = os.environ.get("KEYE_KEY", "none-is-needed-here")
VIDEO_FILE = Path(__file__).parents[2] / "src/keye/assets/demo.mp4"

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "the weather of a city", "parameters": PARAMETERS},
}
QUESTION = "when is the cyan triangle visible?"

_cases: list[tuple[str, Callable[[], Any]]] = []


def png(width: int = 112, height: int = 112) -> bytes:
    """A red picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xd2\x28\x1e" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def image_base64() -> str:
    return base64.b64encode(png()).decode()


def image_url() -> str:
    return f"data:image/png;base64,{image_base64()}"


def video_url() -> str:
    return f"data:video/mp4;base64,{base64.b64encode(VIDEO_FILE.read_bytes()).decode()}"


def image_message() -> dict[str, Any]:
    """A question about a picture, in OpenAI's parts."""
    picture = {"type": "image_url", "image_url": {"url": image_url()}}
    return {"role": "user", "content": [picture, {"type": "text", "text": "what colour is it?"}]}


def video_message() -> dict[str, Any]:
    """A question about a video, in the parts that vLLM, SGLang and keye share."""
    clip = {"type": "video_url", "video_url": {"url": video_url()}}
    return {"role": "user", "content": [clip, {"type": "text", "text": QUESTION}]}


def check_interval(text: str) -> None:
    """The answer about the video must name when the triangle is visible, as seconds."""
    assert any(character.isdigit() for character in text), text


def check_answer(value: Any) -> None:
    """A value of SCHEMA."""
    assert value in ({"answer": "yes"}, {"answer": "no"}), value


def check_city(value: Any) -> None:
    """Arguments of the tool."""
    data = json.loads(value) if isinstance(value, str) else value
    assert data in ({"city": "Paris"}, {"city": "Rome"}), value


def case(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a case: chat, stream, image, video, tools, structured, errors, or a further one of a client's own."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _cases.append((name, function))
        return function

    return register


def raises(kind: type[BaseException], function: Callable[[], Any], *words: str) -> None:
    """`function` must raise `kind` with these words in its sentence."""
    try:
        function()
    except kind as error:
        text = str(error)
        assert all(word in text for word in words), text
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def report() -> None:
    """Runs the cases, or those named on the command line."""
    counts = {"passed": 0, "failed": 0}
    for name, function in _cases:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        begin, outcome, events = time.monotonic(), "passed", ""
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_wait(result))
        except Exception as error:  # noqa: BLE001 - whatever a client raises is the outcome
            outcome, events = "failed", f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        counts[outcome] += 1
        line = {"case": name, "outcome": outcome, "seconds": round(time.monotonic() - begin, 2)}
        print(json.dumps({**line, "error": events} if events else line), flush=True)
    print(", ".join(f"{number} {word}" for word, number in counts.items()))
    sys.exit(1 if counts["failed"] else 0)


async def _wait(awaitable: Any) -> Any:
    return await awaitable
