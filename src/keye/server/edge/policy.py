"""From the server's settings to its defences: which guard stands before the application, and what may be fetched.

Knows the names of a few settings, not where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from keye.media.source.fetch import FetchPolicy
from keye.media.source.hosts import parse_host_rule
from keye.server.edge.guard import GuardSettings
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Limits
from keye.server.edge.request_head import is_ip

#: What a form adds to the file in it, in bytes.
FORM_BYTES = 64 * 1024


class Edges(Protocol):
    """The settings that the edge of the server needs. `keys` are secrets by their names, `allow_urls` the rules of
    `keye.media.source.hosts.parse_host_rule`, `allow_media_hosts` the same for hosts at private addresses,
    `allowed_hosts` further names of this server, `allow_origins` pages elsewhere; the rest are bytes and counts."""

    @property
    def host(self) -> str: ...
    @property
    def keys(self) -> Mapping[str, str]: ...
    @property
    def allow_urls(self) -> tuple[str, ...]: ...
    @property
    def allowed_hosts(self) -> tuple[str, ...]: ...
    @property
    def allow_origins(self) -> tuple[str, ...]: ...
    @property
    def allow_media_hosts(self) -> tuple[str, ...]: ...
    @property
    def upload_bytes(self) -> int: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def pictures(self) -> int: ...
    @property
    def queue(self) -> int: ...


def guard_settings(settings: Edges, limits: Limits | None = None) -> GuardSettings:
    """What the guard needs. Raises `KeyeError` for keys that are not safe. Made once: its keyring also salts caches."""
    own = () if settings.host in ("", "localhost") or is_ip(settings.host.strip("[]")) else (settings.host,)
    limits = limits or Limits()
    # No key of several fills the queue, so that the others find a place in it.
    most = limits.running_per_key if len(settings.keys) < 2 else max(settings.queue // 2, 1)
    sizes = replace(
        limits, upload_bytes=settings.upload_bytes + FORM_BYTES, json_bytes=settings.body_bytes,
        running_per_key=min(limits.running_per_key, most),
    )  # fmt: skip
    names = tuple(name.lower().rstrip(".") for name in (*own, *settings.allowed_hosts))
    return GuardSettings(Keyring.of(settings.keys), names, tuple(settings.allow_origins), limits=sizes)


def fetch_policy(settings: Edges) -> FetchPolicy:
    """What a request may name. Raises `KeyeError` for a rule that is none."""
    private = tuple(parse_host_rule(rule) for rule in settings.allow_media_hosts)
    hosts = (*(parse_host_rule(rule) for rule in settings.allow_urls), *private)
    limits = replace(FetchPolicy.limits, private_hosts=private)
    return FetchPolicy(hosts, limits=limits, video_bytes=min(settings.upload_bytes, FetchPolicy.video_bytes),
                       list_frames=settings.pictures)  # fmt: skip
