"""Where reports of a watched source go: a webhook, and a digest file for each day.

A webhook is the one address that the user named: no redirect is followed and no proxy used. What cannot be delivered
waits in a bounded queue and is tried again, longer and longer apart; what does not fit is counted and dropped.
"""

from __future__ import annotations

import datetime
import html
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from keye.chat.times import format_seconds
from keye.errors import KeyeError
from keye.files import unwritable
from keye.units import one_line

#: Reports that wait at most, seconds for an answer, tries, and seconds before the second try, doubled each time.
QUEUE, TIMEOUT, TRIES, BACKOFF = 64, 10.0, 6, 1.0
_HTML: Final = frozenset({".html", ".htm"})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


class Webhook:
    """Posts reports as JSON to an address, in a thread. `delivered`, `failed` and `dropped` count them; `on_failure` is
    called with a sentence when one is given up."""

    def __init__(
        self, url: str, on_failure: Callable[[str], None] | None = None, *, backoff: float = BACKOFF,
        timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        check_webhook(url)
        self.url, self._on_failure, self._backoff, self._timeout = url, on_failure, backoff, timeout
        self.delivered = self.failed = self.dropped = 0
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE)
        self._accepted, self._is_abandoned, self._lock = 0, False, threading.Lock()
        self._closing = threading.Event()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self._thread = threading.Thread(target=self._run, name="keye-webhook", daemon=True)
        self._thread.start()

    def post(self, report: Mapping[str, Any]) -> None:
        """Queues a report; never waits."""
        try:
            self._queue.put_nowait(json.dumps(report, ensure_ascii=False, allow_nan=False).encode())
            self._accepted += 1
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float = TIMEOUT) -> None:
        """Waits for what is queued, at most so many seconds; what is not delivered by then counts as failed."""
        self._closing.set()
        end = time.monotonic() + seconds
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            self._is_abandoned = True
            self.failed = self._accepted - self.delivered

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            error = self._deliver(body)
            with self._lock:
                if self._is_abandoned:
                    return
                if error is None:
                    self.delivered += 1
                else:
                    self.failed += 1
            if error is not None and self._on_failure is not None:
                with suppress(Exception):  # later reports are to go out all the same
                    self._on_failure(f"the webhook did not take a report ({error})")

    def _deliver(self, body: bytes) -> str | None:
        """What went wrong at last; None where the report was taken."""
        error = ""
        for number in range(TRIES):
            if number and self._closing.wait(self._backoff * 2 ** (number - 1)):
                break
            try:
                headers = {"Content-Type": "application/json", "User-Agent": "keye"}
                request = urllib.request.Request(self.url, body, headers, method="POST")
                with self._opener.open(request, timeout=self._timeout) as response:
                    response.read(1)
                return None
            except urllib.error.HTTPError as failure:
                error = f"status {failure.code}"
                failure.close()
                if 300 <= failure.code < 500 and failure.code not in (408, 425, 429):
                    break  # another try would get the same answer
            except Exception as failure:  # noqa: BLE001 - whatever a server answers, later reports are to go out
                error = one_line(str(getattr(failure, "reason", failure)))[:200].strip() or type(failure).__name__
        return error


def check_webhook(url: str) -> None:
    """`KeyeError` for anything but an http or https address."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or not url.isprintable() or " " in url:
        raise KeyeError("the webhook is not an http or https address; write it as https://host/path")


def digest_path(path: Path, day: datetime.date) -> Path:
    """The digest of a day: `watch.md` becomes `watch-2026-11-30.md`."""
    return path.with_name(f"{path.stem}-{day.isoformat()}{path.suffix or '.md'}")


def append_digest(path: Path, report: Mapping[str, Any], now: datetime.datetime) -> None:
    """Adds a report to the digest of its day, in one write. `KeyeError` where the file cannot be written."""
    target, is_html = digest_path(path, now.date()), path.suffix.lower() in _HTML
    start, end = format_seconds(report["start"]), format_seconds(report["end"])
    words = [now.strftime("%H:%M:%S"), report["event"], f"{start} to {end}", f"{report['probability']:.0%}",
             Path(report["clip"]).name if report["clip"] else ""]  # fmt: skip
    title = f"{report['source']}, {now.date().isoformat()}"
    columns = ("time", "event", "seconds of the source", "probability", "clip")
    if is_html:
        head = _html_head(title, columns)
        line = "<tr>" + "".join(f"<td>{html.escape(one_line(word))}</td>" for word in words) + "</tr>\n"
    else:
        head = f"# {_markdown(title)}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        line = f"| {' | '.join(map(_markdown, words))} |\n"
    try:
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            is_new = os.fstat(file).st_size == 0
            os.write(file, ((head if is_new else "") + line).encode())
        finally:
            os.close(file)
    except OSError as error:
        raise unwritable(target, error) from None


def _html_head(title: str, columns: tuple[str, ...]) -> str:
    cells = "".join(f"<th>{column}</th>" for column in columns)
    return (f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f"<h1>{html.escape(title)}</h1>\n<table>\n<tr>{cells}</tr>\n")  # fmt: skip


def _markdown(text: str) -> str:
    """Text in which nothing is markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+!|~" else letter for letter in one_line(text))
