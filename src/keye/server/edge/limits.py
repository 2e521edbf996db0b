"""Every number by which the guard rejects a request, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from keye.units import MIB


@dataclass(frozen=True)
class Limits:
    """What a request may be and cost before a model sees it. Bytes, seconds, or counts.

    Heads: `header_bytes` and `header_count` of all headers together, `path_bytes` and `query_bytes`, `head_seconds`
    until a connection has sent its head, `connections` at once and `connections_per_address`; an idle one is kept for
    `keep_alive_seconds`, for `unknown_seconds` where no key was shown.
    Bodies: `json_bytes`, `upload_bytes`; the first byte and each next one within `idle_seconds`, and after
    `grace_seconds` on average `json_rate` or `upload_rate` bytes a second; `buffered_bytes` of all requests together.
    JSON: `json_depth` of nesting, `json_keys` of objects, `json_values` in all, `number_digits` of one number,
    `text_bytes` of everything but long media.
    Traffic: `requests_per_second` of one key or address, `burst` at once, `attempt_cost` of a wrong key in requests;
    `running` requests of all, `running_per_key` of one key; `tracked` keys and addresses are remembered.
    Answers: a client must take a piece within `send_seconds`.
    """

    header_bytes: int = 32 * 1024
    header_count: int = 64
    path_bytes: int = 512
    query_bytes: int = 2048
    head_seconds: float = 10.0
    connections: int = 1024
    connections_per_address: int = 256
    keep_alive_seconds: int = 75
    unknown_seconds: int = 10

    json_bytes: int = 64 * MIB
    upload_bytes: int = 4096 * MIB
    buffered_bytes: int = 1024 * MIB
    idle_seconds: float = 20.0
    grace_seconds: float = 10.0
    json_rate: float = 16 * 1024.0
    upload_rate: float = 16 * 1024.0

    json_depth: int = 64
    json_keys: int = 50_000
    json_values: int = 500_000
    number_digits: int = 40
    text_bytes: int = 8 * MIB

    requests_per_second: float = 200.0
    burst: float = 400.0
    attempt_cost: float = 10.0
    running: int = 512
    running_per_key: int = 256
    tracked: int = 10_000

    send_seconds: float = 60.0
