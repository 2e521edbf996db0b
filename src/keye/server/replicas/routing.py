"""Which of several replicas answers a request: the one that has processed its media, unless it is overloaded.

Rendezvous hashing (Thaler and Ravishankar, 1998): each key ranks all replicas by a hash of both, so that a replica that
comes or goes moves only its own keys. With bounded load (Mirrokni, Thorup and Zadimoghaddam, 2018): a replica that has
more than its share of the requests under way is passed over, and the next in the key's ranking takes it. Knows names
and numbers; sends nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

#: Characters that are hashed at a time.
_PIECE: Final = 1 << 20
#: What one replica may have, in parts of an even share.
SLACK: Final = 1.25
#: Keys of requests under which the name of a medium stands, or its bytes.
_NAMES: Final = (
    "video", "image", "url", "video_url", "image_url", "file_url", "file_id", "data", "file_data"
)  # fmt: skip


def choose(key: str | None, loads: Mapping[str, int], *, slack: float = SLACK) -> str:
    """A replica for a request about the media of `key`: `loads` are the requests under way at each. Without a key the
    one that has least to do. No replica gets more than `slack` times an even share, rounded up."""
    assert loads and slack >= 1
    if key is None:
        return min(loads, key=lambda name: (loads[name], name))
    most = math.ceil(slack * (sum(loads.values()) + 1) / len(loads))
    return next(name for name in ranking(key, loads) if loads[name] < most)


def ranking(key: str, replicas: Collection[str]) -> list[str]:
    """The replicas in the order in which this key prefers them; the same on every machine."""
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{name}\0{key}".encode()).digest())


def media_key(body: Mapping[str, Any]) -> str | None:
    """What requests about the same media have in common, whatever else they ask; None where there are none. Media are
    known by what the client sends: the same file under two names has two keys."""
    digest, has_media = hashlib.sha256(), False
    for name in media_in(body):
        for at in range(0, len(name), _PIECE):  # a data: URL may have many megabytes
            digest.update(name[at : at + _PIECE].encode("utf-8", "replace"))
        digest.update(b"\0")
        has_media = True
    return digest.hexdigest() if has_media else None


def media_in(value: object, name: str = "") -> Iterator[str]:
    """The names of media in a body of any route, in their order; `name` is the key under which `value` stands."""
    if isinstance(value, str):
        if name in _NAMES:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from media_in(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from media_in(item, key)
