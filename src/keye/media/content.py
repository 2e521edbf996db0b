"""What a medium is, as one short key: equal keys mean equal visual tokens of one model, whatever the files are called.

The key is meant for caches of this process, so versions of decoders are not part of it. What reading a file gave, its
hash and the facts about a video, is remembered while path, size, inode and time of change stay the same."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

import numpy as np
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions, MediumKind
from keye.media.info import VideoInfo
from keye.media.pixels.patches import is_array, is_tensor, to_numpy
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Source, as_source, decode_list
from keye.media.video import DecodeLimits, probe

if TYPE_CHECKING:
    from keye.media.image import ImagePlan

K = TypeVar("K")
V = TypeVar("V")

#: Files whose hash is remembered.
REMEMBERED: Final = 4096
#: Files whose facts are remembered: those of an hour take megabytes.
REMEMBERED_PROBES: Final = 32
#: Device, inode, size, time of change and path of a file.
_Identity = tuple[int, int, int, int, str]
_hashes: OrderedDict[_Identity, bytes] = OrderedDict()
_probes: OrderedDict[tuple[_Identity | bytes, DecodeLimits | None, bytes, int | None], VideoInfo] = OrderedDict()
_lock = threading.Lock()


def content_key(
    kind: MediumKind,
    source: Any,
    options: MediaOptions,
    plan: VideoPlan | ImagePlan | None,
    config: ProcessorConfig,
    salt: bytes = b"",
) -> bytes:
    """32 bytes that name the visual tokens of a medium: a file or pictures in memory, under its plan, if it has one. A
    different `salt` gives a different key, so that owners share no entries of a cache.

    Reading a file of hours takes seconds; its hash is remembered by path, size, inode and time of change.
    """
    digest = hashlib.sha256(hashlib.sha256(salt).digest())
    facts = {} if plan is None else {k: v for k, v in asdict(plan).items() if k != "name"}
    described = {"kind": kind, "options": asdict(options), "config": config.to_dict(), "plan": facts}
    digest.update(json.dumps(described, sort_keys=True, default=lambda number: number.item()).encode())
    digest.update(_hash_value(source))
    return digest.digest()


def source_hash(source: Source) -> bytes:
    """SHA-256 of the bytes of a file or of bytes in memory."""
    if source.data is not None:
        return hashlib.sha256(source.data).digest()
    with source.open() as file:
        identity = _identify(file, source)
        digest = partial(hashlib.file_digest, file, "sha256")  # type: ignore[arg-type]  # a file on disk has readinto
        return _remember(_hashes, identity, lambda: digest().digest(), REMEMBERED)


def probe_cached(
    source: Source, limits: DecodeLimits | None, salt: bytes = b"", *, track: int | None = None
) -> VideoInfo:
    """Facts about a video file, found out once for each `salt` and track: a decode worker scans it at first."""
    key = identify(source)
    make = partial(probe, source, limits, track=track)
    return _remember(_probes, (key, limits, salt, track), make, REMEMBERED_PROBES)


def identify(source: Source) -> _Identity | bytes:
    """What tells a file, or bytes in memory, from others in this process, without reading a file."""
    if source.data is not None:
        return source_hash(source)
    with source.open() as file:
        return _identify(file, source)


def _identify(file: BinaryIO, source: Source) -> _Identity:
    if source.part is not None:
        path, offset = source.part.path, source.part.offset
        status = path.stat()
        return status.st_dev, status.st_ino, source.size, status.st_mtime_ns, f"{path}:{offset}"
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, str(source.path)


def _remember(memory: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """The value of a key, made where it is not known; the `most` used last are kept."""
    with _lock:
        if key in memory:
            memory.move_to_end(key)
            return memory[key]
    value = make()
    with _lock:
        memory[key] = value
        while len(memory) > most:
            memory.popitem(last=False)
    return value


def _hash_value(value: Any) -> bytes:
    """The hash of whatever a user may give as a medium: a file, a picture, frames, or a list of these."""
    if isinstance(value, Source):
        return source_hash(value)
    if isinstance(value, Image.Image):
        # Pixels with all that decides what they look like: mode, palette, transparency.
        palette = value.getpalette() if value.mode in ("P", "PA") else None
        described = repr((value.mode, value.size, palette, value.info.get("transparency")))
        return hashlib.sha256(described.encode() + b"\0" + value.tobytes()).digest()
    if is_array(value):
        tensor = is_tensor(value)
        array = np.asarray(to_numpy(value) if tensor else value)
        described = repr((tensor, str(array.dtype), array.shape))
        return hashlib.sha256(described.encode() + b"\0" + np.ascontiguousarray(array).tobytes()).digest()
    listed = value if isinstance(value, list | tuple) else decode_list(value)
    if listed is None:
        return source_hash(as_source(value))
    return hashlib.sha256(b"".join(map(_hash_value, listed))).digest()
