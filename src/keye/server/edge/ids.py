"""Names that only tell requests and parts of answers apart. What a name gives a right to, such as a file, is not one of
them: it comes from `secrets`."""

from __future__ import annotations

import random
import secrets

#: Seeded once: asking the system each time would let go of Python's lock, for which a busy model then lets one wait.
_random = random.Random(secrets.randbits(256))


def unique(prefix: str) -> str:
    """`prefix` and 24 hexadecimal digits."""
    return f"{prefix}{_random.getrandbits(96):024x}"
