"""Steps on the page that its tests share."""

from __future__ import annotations

from typing import Any

THUMBNAILS_DRAWN = "#thumbs:not(:has(canvas:not([data-drawn]))) canvas:nth-child(8)"


def open_sample(page: Any) -> None:
    page.click("#sample")
    page.wait_for_selector("#plan-meter:not([hidden])")
    page.wait_for_selector("#timeline:not([hidden])")


def ask(page: Any, question: str) -> Any:
    """Asks, waits for the end and returns the turn."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    turn = page.locator(".turn").last
    turn.locator(".answer[aria-busy=false]").wait_for()
    turn.locator(".usage").wait_for(state="attached")
    return turn


def choose(turn: Any, entry: str) -> None:
    """Chooses an entry of a turn's menu."""
    turn.get_by_role("button", name="More for this answer").click()
    turn.get_by_role("menuitem", name=entry).click()


def position(page: Any) -> float:
    return page.evaluate("document.getElementById('video').currentTime")
