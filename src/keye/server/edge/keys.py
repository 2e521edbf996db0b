"""API keys: compared in constant time, and salts that keep the caches of their owners apart.

Holds digests of keys, never the keys.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from keye.errors import KeyeError

#: The owner of requests where no key is needed.
LOCAL = "local"
#: Shortest key, in characters.
MIN_KEY = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Keyring:
    """Names of keys and SHA-256 digests of the keys. `secret` is drawn by each process, so that a salt can be
    neither guessed nor computed from a key."""

    digests: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @staticmethod
    def of(keys: Mapping[str, str]) -> Keyring:
        """A ring of the keys by their names. Raises `KeyeError` for a key or a name that is not safe."""
        for name, key in keys.items():
            if not _NAME.fullmatch(name) or name == LOCAL:
                raise KeyeError(f"{name!r} cannot name a key; use letters, digits, dots, dashes, and not {LOCAL!r}")
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise KeyeError(f"the key {name!r} is not safe; take {MIN_KEY} or more printable ASCII characters")
        digests = {name: _digest(key.encode()) for name, key in keys.items()}
        if len(set(digests.values())) < len(digests):
            raise KeyeError("two names have the same key; give each its own")
        return Keyring(digests)

    def owner(self, authorization: bytes | None) -> str | None:
        """The name of the key in an Authorization header, `LOCAL` where none is needed, None for a wrong key. How long
        it takes depends on the number of keys only."""
        if not self.digests:
            return LOCAL
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = _digest(key.strip(b" "))
        owner = None
        for name, known in self.digests.items():
            if hmac.compare_digest(known, digest):
                owner = name
        return owner if scheme.lower() == b"bearer" else None

    def salt(self, owner: str) -> bytes:
        """32 bytes with which prefixes and media of this owner are cached; of no other owner, and of no other run."""
        return hmac.new(self.secret, owner.encode(), hashlib.sha256).digest()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
