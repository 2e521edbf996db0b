"""Runs the application in uvicorn until SIGTERM or Ctrl-C, and says at start-up what holds."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn

from keye.engine.engine import Keye
from keye.media.confinement import held
from keye.server.app import guarded_app
from keye.server.audit import Audit
from keye.server.limits import Limits
from keye.server.protocol import uvicorn_options
from keye.server.settings import Settings


def run_server(
    model: Keye,
    settings: Settings,
    listening: socket.socket,
    audit: Audit | None = None,
    *,
    gauges: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Serves on a bound socket. SIGTERM stops listening, lets running requests end for `drain_seconds`, and returns.
    `gauges` are numbers of the decode service for /metrics."""
    config = uvicorn.Config(
        guarded_app(model, settings, audit, decode_gauges=gauges),
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=round(settings.drain_seconds),
        timeout_keep_alive=75,
        backlog=2048,
        **uvicorn_options(Limits()),
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it once more when it is done
    try:
        _Server(config, model, settings).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Prints the start-up block when requests are taken."""

    def __init__(self, config: uvicorn.Config, model: Keye, settings: Settings) -> None:
        super().__init__(config)
        self._model, self._settings = model, settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is here stays: searching it for rubbish again and again would stop the server for a tenth of a second.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            block = start_block(self._model, self._settings, sockets[0].getsockname())
            print(f"{block}\n{'sandbox':<10} {_confined()}", flush=True)


def start_block(model: Keye, settings: Settings, address: Any) -> str:
    """What someone who starts the server wants to know: where it is, what it serves, and which limits hold."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    config = model.config
    keys = f"{len(settings.keys)} of them may ask" if settings.keys else "none needed: only this machine can ask"
    urls = ", ".join(settings.allow_urls) or "none are fetched; upload files or send data: URLs"
    rows = {
        "address": f"http://{host}:{address[1]}",
        "model": f"{settings.served_name or model.name}, Keye-VL {config.generation}, {model.attention} attention",
        "context": f"{config.text.max_position_embeddings:,} tokens",
        "keys": keys,
        "addresses": urls,
        "uploads": f"{_size(settings.upload_bytes)} each, {_size(settings.stored_bytes)} in all, "
        f"kept for {settings.file_seconds / 3600:g} h",
        "requests": f"{settings.queue} at once, {settings.request_seconds:g} s each",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def _confined() -> str:
    """Which limits of the decode workers hold on this system."""
    try:
        return held().sentence()
    except RuntimeError as error:
        return f"decode workers cannot start: {error}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:g} MiB"
