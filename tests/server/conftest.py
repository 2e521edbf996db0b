"""What the tests of the page share: the mock server beside this file, and a real browser."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from mock_server import MockServer

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; the test is skipped where it or playwright is not installed."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield opened
        opened.close()


@pytest.fixture
def server() -> Iterator[MockServer]:
    running = MockServer()
    yield running
    running.close()


@pytest.fixture
def page(browser: Any, server: MockServer) -> Iterator[Any]:
    """The page, freshly opened. After the test none of its scripts has failed, none was smuggled in, and no request has
    left the host."""
    context = browser.new_context(viewport={"width": 1280, "height": 850}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    failures: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("console", lambda line: failures.append(line.text) if "Content Security Policy" in line.text else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(server.address)
    opened.wait_for_selector("body[data-ready]")
    yield opened
    smuggled = opened.evaluate("window.hacked")
    context.close()
    assert failures == [] and smuggled is None
    assert [url for url in asked if not url.startswith((server.address, f"blob:{server.address}", "data:"))] == []
