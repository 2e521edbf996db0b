"""Steps on the page that its tests share."""

from __future__ import annotations

from typing import Any

THUMBNAILS_DRAWN = "#pictures[data-drawn=yes]"


def open_sample(page: Any) -> None:
    page.click("#sample")
    page.wait_for_selector("#plan-meter:not([hidden])", state="attached")
    page.wait_for_selector("#timeline:not([hidden])")


def ask(page: Any, question: str, mode: str = "ask") -> Any:
    """Asks, waits for the end and returns the turn."""
    page.check(f"input[name=mode][value={mode}]", force=True)
    page.fill("#question", question)
    page.press("#question", "Enter")
    turn = page.locator(".turn").last
    turn.get_by_role("heading", name=question, exact=True).wait_for()
    turn.locator(".answer[aria-busy=false]:has(.card, .note, .answer-text:not(:empty))").wait_for()
    return turn


def find(page: Any, event: str) -> Any:
    """Looks for an event, waits for the end and returns the turn."""
    return ask(page, event, "find")


def choose(turn: Any, entry: str) -> None:
    """Chooses an entry of the menu of a turn's first moment, or of its text without a moment."""
    turn.get_by_role("button", name="More", exact=True).first.click()
    turn.get_by_role("menuitem", name=entry).click()


def show_details(page: Any) -> None:
    page.get_by_role("tab", name="Details").click()


def position(page: Any) -> float:
    return page.evaluate("document.getElementById('video').currentTime")
