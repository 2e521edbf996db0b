"""Which addresses untrusted users may have this machine fetch, by how they are written. Opens and resolves nothing.

Programs disagree about odd URLs, and what one checks another may fetch. So an address passes only in the plain form in
which all agree: ASCII, a DNS name in lower case, no user, no escapes in the host, the scheme's own port.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from keye.errors import KeyeError, MediaError

_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_PLAIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]{1,253})(?::(?P<port>[0-9]{1,5}))?(?P<rest>[/?][!-\[\]-~]*)?"
)
#: What ends in a number is an IPv4 address to browsers, in decimal, octal or hexadecimal form.
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_PORTS = {"http": 80, "https": 443}
MAX_ADDRESS = 2048


def parse_host_rule(text: str) -> str:
    """A rule of `--allow-url`: `host`, `host:port` or `*.suffix`, in lower case. An IPv4 address stands for itself."""
    rule = text.strip().lower()
    name, colon, port = rule.removeprefix("*.").partition(":")
    valid = _NAME.fullmatch(name) and (not _NUMERIC.fullmatch(name) or (_is_ipv4(name) and not rule.startswith("*.")))
    if rule.startswith("*.") and "." not in name:
        valid = None  # A whole top-level domain, which belongs to no owner.
    if not valid or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise KeyeError(f"{text!r} is not a host that can be allowed; write host, host:port or *.domain.example")
    return rule


def check_address(url: str, rules: Sequence[str]) -> None:
    """Raises `MediaError` unless `url` is a plain http or https address of a host that one of `rules` allows."""
    if not rules:
        raise MediaError("addresses are not fetched by this server; upload the file or send it as a data: URL")
    plain = _PLAIN.fullmatch(url) if len(url) <= MAX_ADDRESS else None
    host = plain["host"].lower() if plain else ""
    if plain is None or not _NAME.fullmatch(host) or (_NUMERIC.fullmatch(host) and not _is_ipv4(host)):
        raise MediaError(
            "the address is not plain; write http(s)://host/path in ASCII, with escapes in the path only and without "
            "a user name"
        )
    if not allows_host(rules, host, int(plain["port"] or _PORTS[plain["scheme"]]), plain["scheme"]):
        raise MediaError("the address's host and port are not among those that this server may fetch from")


def allows_host(rules: Sequence[str], host: str, port: int, scheme: str) -> bool:
    """Whether one of `rules` is for this host and port; without a port in it, a rule is for the scheme's own."""
    host = host.lower()
    for rule in rules:
        name, _, its_port = rule.partition(":")
        inside = name.startswith("*.") and host.endswith(name[1:]) and not _NUMERIC.fullmatch(host)
        if port == (int(its_port) if its_port else _PORTS[scheme]) and (inside or host == name):
            return True
    return False


def _is_ipv4(text: str) -> bool:
    try:
        return str(ipaddress.IPv4Address(text)) == text
    except ValueError:
        return False
