"""Ids that only distinguish requests and parts of answers. Ids that grant access, such as those of files, come from
`secrets`."""

from __future__ import annotations

import random
import secrets

#: Seeded once: asking the system each time would release Python's lock, and a busy model would then delay the request.
_random = random.Random(secrets.randbits(256))


def new_id(prefix: str) -> str:
    """`prefix` and 24 hexadecimal digits."""
    return f"{prefix}{_random.getrandbits(96):024x}"
