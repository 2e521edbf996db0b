"""All settings of the server in one frozen object, and what follows from them for its guard and for fetching media."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from keye.errors import KeyeError, Option
from keye.media.source.fetch import FetchPolicy
from keye.media.source.hosts import parse_host_rule
from keye.media.speech import Transcriber
from keye.server.edge.guard import GuardSettings
from keye.server.edge.keys import Keyring
from keye.server.edge.limits import Limits
from keye.server.edge.request_head import is_ip, is_loopback
from keye.units import GIB, KIB, MIB

#: Bytes that a form adds to the file in it.
FORM_BYTES = 64 * KIB
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Settings:
    """How the server listens and what a client may ask of it.

    `keys` maps a name, under which use is counted, to the secret of its owner; empty only on the loopback interface.
    `allow_urls` are hosts whose media may be fetched: a name, or `*.name` for all below it. Sizes are bytes, times
    seconds; `file_seconds` is how long an upload is kept, `drain_seconds` how long running requests may go on after
    SIGTERM. `served_names` are what clients may call the model; any other name is taken, too, with a note, unless
    `strict_model_name`. `strict_limits` rejects a max_tokens beyond the context's end, which is lowered otherwise.
    `key_bytes` are the most of `stored_bytes` that the files of one key may take: a quarter of it, or all
    where there is one key. `allow_origins` are web pages elsewhere that may use the server, `allow_media_hosts` hosts
    whose media may be fetched also at private addresses. `allowed_hosts` are names in the Host header beside the
    address that is listened on. A search takes at most `find_seconds` in its turn and `find_tokens` tokens for its
    question. `transcriber` is the service that transcribes speech, where requests ask for it. `library` is the folder
    of a library that all clients may search; its folders are managed by clients where no keys are needed, or
    `library_manage` is set. Clients may load and unload adapters that lie in `adapter_folder`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow_urls: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    strict_model_name: bool = False
    strict_limits: bool = False
    allow_origins: tuple[str, ...] = ()
    allow_media_hosts: tuple[str, ...] = ()
    upload_bytes: int = 4 * GIB
    stored_bytes: int = 16 * GIB
    stored_files: int = 256
    key_bytes: int | None = None
    file_seconds: float = 24 * 3600.0
    body_bytes: int = 64 * MIB
    messages: int = 1024
    media: int = 64
    pictures: int = 2048
    queue: int = 256
    request_seconds: float = 900.0
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    clip_seconds: float = 1800.0
    find_seconds: float = 3600.0
    find_tokens: int = 1_000_000
    transcriber: Transcriber | None = None
    library: Path | None = None
    library_manage: bool = False
    adapter_folder: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise KeyeError("{} is {}; it must be between 0 and 65535", Option("port"), self.port)
        if not self.keys and not is_loopback(self.host):
            raise KeyeError(
                "{} is reachable from other machines, so clients must show a key; set one with {} or KEYE_API_KEY",
                self.host, Option("api_key_file"),
            )  # fmt: skip
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise KeyeError(
                    "{} is {!r}; write the scheme and the host of a page in lower case, as https://app.example",
                    Option("allow_origin"), origin,
                )  # fmt: skip
        Keyring.of(self.keys)

    @property
    def bytes_of_key(self) -> int:
        """The most bytes of files of one key."""
        if self.key_bytes is not None:
            return self.key_bytes
        return self.stored_bytes if len(self.keys) < 2 else self.stored_bytes // 4


def guard_settings(settings: Settings, limits: Limits | None = None) -> GuardSettings:
    """Settings of the guard. Create them once: their keyring also salts caches."""
    own = () if settings.host in ("", "localhost") or is_ip(settings.host.strip("[]")) else (settings.host,)
    limits = limits or Limits()
    # One of several keys cannot fill the queue.
    most = limits.running_per_key if len(settings.keys) < 2 else max(settings.queue // 2, 1)
    sizes = replace(
        limits, upload_bytes=settings.upload_bytes + FORM_BYTES, json_bytes=settings.body_bytes,
        running_per_key=min(limits.running_per_key, most),
    )  # fmt: skip
    names = tuple(name.lower().rstrip(".") for name in (*own, *settings.allowed_hosts))
    return GuardSettings(Keyring.of(settings.keys), names, tuple(settings.allow_origins), limits=sizes)


def fetch_policy(settings: Settings) -> FetchPolicy:
    """What a request may name; `KeyeError` for a rule that is not valid."""
    private = tuple(parse_host_rule(rule) for rule in settings.allow_media_hosts)
    hosts = (*(parse_host_rule(rule) for rule in settings.allow_urls), *private)
    limits = replace(FetchPolicy.limits, private_hosts=private)
    return FetchPolicy(hosts, limits=limits, video_bytes=min(settings.upload_bytes, FetchPolicy.video_bytes),
                       list_frames=settings.pictures)  # fmt: skip
