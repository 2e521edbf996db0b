"""How often and how many at once: token buckets and counts of running requests, by key and by address.

Knows time only through the clock it is given. Memory is bounded: of very many keys or addresses the least recent is
forgotten, which can only be to its advantage.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable

from keye.server.edge.limits import Limits


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
