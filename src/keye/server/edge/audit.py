"""The audit log: one line of JSON for each request, of who did how much when. Never of what: no content, no key, no
query string, no file name. Whatever a client chose is escaped and cut, so that no line can pose as another."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

_MAX_TEXT = 128
#: The record of the request that the running task works for; None outside the guard.
CURRENT: ContextVar[Record | None] = ContextVar("keye.request", default=None)


@dataclass
class Record:
    """One request. The application finds it as `CURRENT` and fills in the tokens.

    `request_id` is ours, `key` the name of the key, `path` without a query; sizes in bytes, `seconds` until the end of
    the answer; `code` says why the guard refused it, if it did.
    """

    time: str
    request_id: str
    key: str = ""
    address: str = ""
    method: str = ""
    path: str = ""
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    code: str = ""


class Audit:
    """Writes records by `write`, which gets whole lines that end with a line break."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def log(self, record: Record) -> None:
        fields = asdict(record)
        for name, value in fields.items():
            if isinstance(value, str) and len(value) > _MAX_TEXT:
                fields[name] = value[:_MAX_TEXT] + "..."
            elif isinstance(value, float):
                fields[name] = round(value, 4)
        self._write(json.dumps(fields, ensure_ascii=True, separators=(",", ":")) + "\n")


def is_audit_log(path: Path) -> bool:
    """Whether a file is empty or begins with a record, so that more may be added to it."""
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    try:
        return not first or Record.__dataclass_fields__.keys() == json.loads(first).keys()
    except (ValueError, AttributeError, RecursionError):
        return False


#: Seeded once: asking the system each time would release Python's lock, and a busy model would then delay the request.
_random = random.Random(secrets.randbits(256))


def new_id(prefix: str) -> str:
    """`prefix` and 24 hexadecimal digits."""
    return f"{prefix}{_random.getrandbits(96):024x}"
