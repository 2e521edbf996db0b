"""Responses that clients may refer to later: each with what was asked, on disk beside the uploads, per key.

Knows owners, ages and bytes, and that a response may follow another; the items in it are not looked into.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keye.server.edge.errors import ApiError
from keye.server.uploads import FileStore
from keye.units import MIB

#: Bytes that the responses of one key may take; the oldest go first.
MOST_BYTES: Final = 64 * MIB
#: What each counts for at least: a file takes a block.
_BLOCK: Final = 4096
RESPONSE: Final = "resp_"


def new_response_id() -> str:
    """The id of a response; it cannot be guessed."""
    return RESPONSE + secrets.token_hex(16)


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    created: float


@dataclass(frozen=True)
class StoredResponse:
    """A response as it was returned, and the items of the request that it answers."""

    response: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]]


class ResponseStore:
    """The responses of all owners. Their bytes count as storage of their owner in `files`. Safe to share by threads."""

    def __init__(self, files: FileStore, seconds: float, most_bytes: int = MOST_BYTES) -> None:
        self._files, self._seconds, self._most = files, seconds, most_bytes
        self._entries: defaultdict[str, OrderedDict[str, _Entry]] = defaultdict(OrderedDict)
        self._sizes: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def keep(self, owner: str, stored: StoredResponse) -> bool:
        """Keeps a response under its id; the oldest of the owner make room. False where there is no room for it.
        Blocks."""
        body = json.dumps([stored.response, stored.items], ensure_ascii=False).encode("utf-8", "replace")
        size = max(len(body), _BLOCK)
        if size > self._most:
            return False
        path = self._files.folder / secrets.token_hex(16)
        path.touch(mode=0o600)
        path.write_bytes(body)
        with self._lock:
            mine = self._entries[owner]
            while self._sizes[owner] + size > self._most:
                self._drop(owner, next(iter(mine)))
            try:
                self._files.claim(owner, size)
            except ApiError:
                path.unlink()
                return False
            mine[str(stored.response["id"])] = _Entry(path, size, time.time())
            self._sizes[owner] += size
        return True

    def get(self, owner: str, name: str, param: str = "response_id") -> StoredResponse:
        """A response of this owner; `ApiError` 404 for any other id. Blocks."""
        with self._lock:
            path = self._entry(owner, name, param).path
        try:
            response, items = json.loads(path.read_bytes())
        except FileNotFoundError:  # it was removed just now
            raise _missing(param) from None
        return StoredResponse(response, items)

    def history(self, owner: str, name: str, most: int) -> list[Mapping[str, Any]]:
        """All items up to and with a response, those of the responses that it follows among them; `ApiError` where one
        of these is gone, or they are more than `most`. Blocks."""
        turns: list[StoredResponse] = []
        count, at = 0, name
        while True:
            turns.append(self.get(owner, at, "previous_response_id"))
            count += len(turns[-1].items) + len(turns[-1].response["output"])
            if count > most:
                sentence = f"previous_response_id: the conversation has more than {most:,} items; begin a new one"
                raise ApiError(400, sentence, param="previous_response_id")
            previous = turns[-1].response.get("previous_response_id")
            if previous is None:
                break
            at = str(previous)
        return [item for turn in reversed(turns) for item in (*turn.items, *turn.response["output"])]

    def delete(self, owner: str, name: str) -> None:
        """Removes a response; `ApiError` 404 for an id that is none of this owner's."""
        with self._lock:
            self._entry(owner, name, "response_id")
            self._drop(owner, name)

    def sweep(self) -> None:
        """Removes what is too old."""
        with self._lock:
            for owner in list(self._entries):
                self._sweep(owner)

    def _sweep(self, owner: str) -> None:
        oldest = time.time() - self._seconds
        mine = self._entries[owner]
        while mine and next(iter(mine.values())).created < oldest:
            self._drop(owner, next(iter(mine)))
        if not mine:
            del self._entries[owner]
            self._sizes.pop(owner, None)

    def _entry(self, owner: str, name: str, param: str) -> _Entry:
        if owner in self._entries:
            self._sweep(owner)
        entry = self._entries[owner].get(name) if owner in self._entries else None
        if entry is None:
            raise _missing(param)
        return entry

    def _drop(self, owner: str, name: str) -> None:
        entry = self._entries[owner].pop(name)
        self._sizes[owner] -= entry.size
        self._files.claim(owner, -entry.size)
        with suppress(FileNotFoundError):
            entry.path.unlink()


def _missing(param: str) -> ApiError:
    return ApiError(
        404, f"{param}: no response has this id; it was not stored, was deleted, or is too old", param=param,
        code="not_found",
    )  # fmt: skip
