"""Every number by which the guard rejects a request; how often and how many at once, by key and by address."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable
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


class Buckets:
    """A token bucket for each name: `rate` tokens a second flow in, up to `burst`."""

    def __init__(self, rate: float, burst: float, tracked: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._tracked, self._clock = rate, burst, tracked, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, cost: float = 1.0) -> float:
        """Takes `cost` tokens and returns 0.0, or takes none and returns the seconds until there are enough."""
        now = self._clock()
        level, then = self._levels.pop(name, (self._burst, now))
        level = min(level + (now - then) * self._rate, self._burst)
        missing = min(cost, self._burst) - level
        self._levels[name] = (level - cost if missing <= 0 else level, now)
        if len(self._levels) > self._tracked:
            self._levels.popitem(last=False)
        return 0.0 if missing <= 0 else missing / self._rate

    def __len__(self) -> int:
        return len(self._levels)


class Running:
    """Requests that are being served, in all and by key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_key: Counter[str] = Counter()
        self.total = 0

    def enter(self, key: str) -> bool:
        """Whether one more request of this key may run; it then counts until `leave`."""
        if self.total >= self._limits.running or self._by_key[key] >= self._limits.running_per_key:
            return False
        self.total += 1
        self._by_key[key] += 1
        return True

    def leave(self, key: str) -> None:
        self.total -= 1
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]
        assert self.total >= 0


def client_of(address: str | None) -> str:
    """Whom an address stands for: of IPv6 its first 64 bits, since one client has all that follow."""
    if address is None:
        return "unknown"
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False).network_address)
    return str(ip)
