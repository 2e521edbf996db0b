"""What clients keep here, on disk in a private folder that goes with the server: uploads, indexes made from them, and
responses that they may refer to later. Knows owners, sizes and ages; parses no request."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from keye.config.media import MediumKind
from keye.errors import KeyeError
from keye.files import PrivateFolder
from keye.media.image import plan_image
from keye.media.source.fetch import FetchPolicy, Source, media_kind, untrusted
from keye.media.video import probe
from keye.server.edge.errors import ApiError
from keye.server.library import LIBRARY, ServedLibrary
from keye.server.settings import Settings
from keye.units import MIB, format_bytes

#: How ids begin, of uploads and of indexes made from them.
FILE, INDEX = "file-", "index-"


@dataclass(frozen=True)
class StoredFile:
    """One upload, or an index made from one: `facts` are what was found in it (kind, duration, width, height, fps)."""

    id: str
    owner: str
    name: str
    size: int
    created: float
    path: Path
    facts: Mapping[str, Any]

    @property
    def kind(self) -> MediumKind:
        return cast(MediumKind, self.facts["kind"])

    def source(self) -> Source:
        """The file to open; an open one can be read after the upload is deleted. An index was written here and is
        trusted."""
        source = Source(self.name, self.size, path=self.path)
        return source if self.id.startswith(INDEX) else untrusted(source)

    def to_dict(self) -> dict[str, Any]:
        """The file object of the API."""
        return {
            "id": self.id, "object": "file", "bytes": self.size, "filename": self.name, "purpose": "media",
            "created_at": int(self.created), "status": "processed", "keye": dict(self.facts),
        }  # fmt: skip


class FileStore:
    """The uploads of all owners under the limits of the settings. Safe to share by threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._home = PrivateFolder()
        self.folder = self._home.path
        self._files: dict[str, StoredFile] = {}
        self._arriving: dict[Path, tuple[str, int]] = {}
        self._claimed: Counter[str] = Counter()
        self._lock = threading.Lock()
        #: Removes something of an owner that can be made again, and says whether there was anything.
        self.evict: Callable[[str], bool] = lambda owner: False

    def make_room(self, owner: str, count: int) -> None:
        """Removes what can be made again until there is room for `count` more bytes, or nothing of it is left."""
        while not self._has_room(owner, count) and self.evict(owner):
            pass

    def _has_room(self, owner: str, count: int) -> bool:
        try:
            with self._lock:
                self._check_bytes(owner, count)
        except ApiError:
            return False
        return True

    def check_room(self, owner: str) -> None:
        """`ApiError` where an owner has as many files as may be kept."""
        with self._lock:
            mine = sum(file.owner == owner for file in self._files.values())
            mine += sum(whose == owner for whose, _ in self._arriving.values())
            if mine >= self._settings.stored_files:
                raise ApiError(
                    429, "too many files are kept; delete some of them first", code="too_many_files", retry=60
                )

    def claim(self, owner: str, count: int) -> None:
        """Accounts for `count` bytes (less where negative) that something else keeps for an owner in the folder;
        `ApiError` where there is no room for them."""
        with self._lock:
            self._check_bytes(owner, count)
            self._claimed[owner] += count

    def keep(self, file: StoredFile) -> None:
        """Takes a file that is in the folder already; `ApiError` where it is too large."""
        self.make_room(file.owner, file.size)
        with self._lock:
            self._check_bytes(file.owner, file.size)
            self._files[file.id] = file

    def begin(self, owner: str) -> Path:
        """A new empty file for an upload; `ApiError` where there is no room for one more."""
        self.check_room(owner)
        with self._lock:
            path = self.folder / secrets.token_hex(16)
            self._arriving[path] = owner, 0
        path.touch(mode=0o600)
        return path

    def grow(self, path: Path, count: int) -> None:
        """Accounts for `count` more bytes before they are written."""
        with self._lock:
            owner, _ = self._arriving[path]
        self.make_room(owner, count)
        with self._lock:
            size = self._arriving[path][1] + count
            if size > self._settings.upload_bytes:
                most = format_bytes(self._settings.upload_bytes)
                raise ApiError(413, f"the file is larger than {most}; cut it into parts or re-encode it", param="file")
            self._check_bytes(owner, count)
            self._arriving[path] = owner, size

    def complete(self, path: Path, owner: str, name: str) -> StoredFile:
        """Probes a file that has arrived and keeps it; blocks for the time of a probe. `KeyeError` for anything but
        an image or a video that can be read."""
        with self._lock:
            _, size = self._arriving[path]
        if size == 0:
            raise KeyeError("file: the upload is empty; send the bytes of a video or an image")
        facts = probe_file(untrusted(Source(name, size, path=path)))
        file = StoredFile(FILE + secrets.token_hex(16), owner, name, size, time.time(), path, facts)
        with self._lock:
            del self._arriving[path]
            self._files[file.id] = file
        return file

    def drop(self, path: Path) -> None:
        """Aborts an upload; no effect after `complete`."""
        with self._lock:
            if self._arriving.pop(path, None) is not None:
                path.unlink(missing_ok=True)

    def get(self, file_id: str, owner: str) -> StoredFile:
        """An upload of this owner; `ApiError` 404 for any other id."""
        self.sweep()
        with self._lock:
            file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise ApiError(404, "no file has this id; upload it to /v1/files", param="file_id", code="not_found")
        return file

    def list(self, owner: str, kind: str = FILE) -> list[StoredFile]:
        """All uploads (or indexes) of an owner, the newest first."""
        self.sweep()
        with self._lock:
            mine = [file for file in self._files.values() if file.owner == owner and file.id.startswith(kind)]
        return sorted(mine, key=lambda file: file.created, reverse=True)

    def delete(self, file_id: str, owner: str) -> None:
        """Removes an upload."""
        file = self.get(file_id, owner)
        with self._lock:
            self._files.pop(file.id, None)
        file.path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what is older than the settings allow."""
        oldest = time.time() - self._settings.file_seconds
        with self._lock:
            expired = [file for file in self._files.values() if file.created < oldest]
            for file in expired:
                del self._files[file.id]
        for file in expired:
            file.path.unlink(missing_ok=True)

    def _check_bytes(self, owner: str, count: int) -> None:
        """`ApiError` where `count` bytes more are too many for this owner, or for all together."""
        if count <= 0:
            return
        sizes: Counter[str] = Counter(self._claimed)
        for file in self._files.values():
            sizes[file.owner] += file.size
        for whose, size in self._arriving.values():
            sizes[whose] += size
        if sizes.total() + count > self._settings.stored_bytes:
            raise ApiError(429, "no room is left for files; delete some first", code="storage_full", retry=60)
        if sizes[owner] + count > self._settings.bytes_of_key:
            raise ApiError(
                429, "your files take all the room that one key may have; delete some first", code="storage_full",
                retry=60,
            )  # fmt: skip

    def used(self) -> tuple[int, int]:
        """Files and bytes that are kept."""
        with self._lock:
            return len(self._files), sum(file.size for file in self._files.values())

    def close(self) -> None:
        """Removes the folder."""
        self._home.remove()


def is_stored(reference: object) -> bool:
    """Whether a reference to a medium is the id of an upload, an index, or a video of the library."""
    return isinstance(reference, str) and reference.startswith((FILE, INDEX, LIBRARY))


@dataclass(frozen=True)
class MediaOpener:
    """Opens the media of one owner's requests: files of `store`, videos of the `library`, and what `policy` allows.
    `ApiError` 404 for the id of another owner's file."""

    store: FileStore
    owner: str
    policy: FetchPolicy
    library: ServedLibrary | None = None

    def kind(self, file_id: str) -> MediumKind:
        """What an upload is."""
        if file_id.startswith(LIBRARY):
            return "video"
        return self.store.get(file_id, self.owner).kind

    def open(self, reference: object, kind: MediumKind) -> Source:
        """The file of an id, a data: URL or an address. Blocks."""
        return self.open_stored(str(reference)) if is_stored(reference) else self.policy.fetch(reference, kind)

    def open_stored(self, file_id: str) -> Source:
        """The file of an upload, an index, or a video of the library. Blocks."""
        if self.library is not None and file_id.startswith(LIBRARY):
            return self.library.source(file_id)
        return self.store.get(file_id, self.owner).source()


def probe_file(source: Source) -> dict[str, Any]:
    """What a file is: its kind and what the kind has; `MediaError` where it can be read as neither. Blocks."""
    if media_kind(source) == "image":
        from keye.config import ProcessorConfig

        plan = plan_image(source, ProcessorConfig())
        return {
            "kind": "image", "width": plan.source_width, "height": plan.source_height, "notes": list(plan.notes),
        }  # fmt: skip
    info = probe(source)
    return {
        "kind": "video", "duration": info.duration, "width": info.width, "height": info.height, "fps": info.fps,
        "frames": info.frame_count, "audio": info.sound is not None, "start_offset": info.start_offset,
        "notes": [str(note) for note in info.notes],
    }  # fmt: skip


def safe_name(name: str | None) -> str:
    """A file's name as it may stand in sentences: the last part of a path, printable, not too long."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in last if character.isprintable())[:120].strip()
    return printable.encode("utf-8", "replace").decode() or "upload"


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
            self._files.make_room(owner, size)
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
