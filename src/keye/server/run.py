"""Runs the application in uvicorn until SIGTERM or Ctrl-C, and says at start-up what holds."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import uvicorn

from keye.api import Keye
from keye.media.decode.confinement import measure_confinement
from keye.server.app import guarded_app
from keye.server.edge.audit import Audit
from keye.server.edge.guard import App, Guard, GuardSettings
from keye.server.edge.limits import Limits
from keye.server.edge.protocol import limits_of_system, uvicorn_options
from keye.server.settings import Settings, guard_settings
from keye.units import format_bytes

#: Ends with an error whatever still runs.
Cut = Callable[[], Awaitable[None]]
#: Seconds in which answers that are cut off can say so, before their connections are closed.
_CUT_SECONDS: Final = 5.0


def run_server(
    model: Keye,
    settings: Settings,
    listening: socket.socket,
    audit: Audit | None = None,
    *,
    gauges: Callable[[], Mapping[str, float]] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a model on a bound socket; see `run_app`. `gauges` are numbers of the decode service for /metrics.
    `on_ready` is called with the address when requests are taken, by default a summary is printed."""
    app = guarded_app(model, settings, audit, decode_gauges=gauges)
    context = app.app.state.keye

    async def cut() -> None:
        context.stop_jobs()
        context.engine.fail_open()

    _run(app, settings, listening, on_ready or (lambda address: _print_rows(address, facts(model, settings))), cut)


def run_app(
    app: App,
    settings: Settings,
    listening: socket.socket,
    rows: Mapping[str, str],
    audit: Audit | None = None,
    *,
    cut: Cut,
    guard: GuardSettings | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves any application behind the guard; `rows` are printed at start-up, unless `on_ready` is called with the
    address. `cut` is called in the event loop when the time for running requests is over: it ends each with an
    error."""
    guarded = Guard(app, guard or guard_settings(settings), audit=audit)
    _run(guarded, settings, listening, on_ready or (lambda address: _print_rows(address, rows)), cut)


def _print_rows(address: str, rows: Mapping[str, str]) -> None:
    print("\n".join(f"{name:<10} {value}" for name, value in {"address": address, **rows}.items()), flush=True)


def _run(app: App, settings: Settings, listening: socket.socket, on_ready: Callable[[str], None], cut: Cut) -> None:
    """SIGTERM stops listening, lets running requests end for `drain_seconds`, ends the others by `cut`, and returns."""
    config = uvicorn.Config(
        app, log_level="warning", lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _CUT_SECONDS), backlog=2048,
        **uvicorn_options(limits_of_system(Limits())),
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it once more when it is done
    try:
        _Server(config, on_ready, settings.drain_seconds, cut).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Calls `on_ready` when requests are taken, and `cut` when the time to end them is over."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[str], None], seconds: float, cut: Cut) -> None:
        super().__init__(config)
        self._on_ready, self._seconds, self._cut = on_ready, seconds, cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def cut_in_time() -> None:
            await asyncio.sleep(self._seconds)
            await self._cut()

        cutting = asyncio.create_task(cut_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Keeps the garbage collector from scanning start-up objects again, which would stop the server for 0.1 s.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def facts(model: Keye, settings: Settings) -> dict[str, str]:
    """What the start-up summary says: what is served, and which limits hold."""
    config = model.config
    try:
        sandbox = measure_confinement().sentence()
    except RuntimeError as error:
        sandbox = f"decode workers cannot start: {error}"
    return {
        "model": f"{', '.join(settings.served_names) or model.name}, Keye-VL {config.release.name}, "
        f"{model.runtime.attention} attention",
        "context": f"{config.text.max_position_embeddings:,} tokens",
        "keys": f"{len(settings.keys)} accepted" if settings.keys else "none needed: only this machine can connect",
        "addresses": ", ".join(settings.allow_urls) or "none are fetched; upload files or send data: URLs",
        "uploads": f"{format_bytes(settings.upload_bytes)} each, {format_bytes(settings.stored_bytes)} in all, "
        f"kept for {settings.file_seconds / 3600:g} h",
        "requests": f"{settings.queue} at once, {settings.request_seconds:g} s each",
        "sandbox": sandbox,
    }
