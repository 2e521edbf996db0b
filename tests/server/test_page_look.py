"""Everybody can read and operate the page: rules of axe, contrast, texts that neither overlap nor are cut, sizes of
what is pressed, in both themes, both languages and at six sizes; and forced colours."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.mock_server import LIBRARY, LINES, SEARCHING, MockServer
from tests.support.page import ask, find, open_sample
from tests.support.page_look import faults_of

SIZES = [(1440, 900), (1280, 720), (1024, 768), (844, 390), (390, 844), (320, 640)]
#: This one stands for the others in the fast tests.
FAST = {("dark", "zh", (390, 844))}
CASES = [
    pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow], id=f"{case[0]}-{case[1]}-{case[2][0]}")
    for case in itertools.product(["light", "dark"], ["en", "zh"], SIZES)
]


def show_menu(page: Any) -> None:
    page.locator(".card .icon-button[aria-haspopup]:visible").last.click()


def show_export(page: Any) -> None:
    page.keyboard.press("Escape")
    page.locator(".turn").last.get_by_role("button", name=re.compile("^(Export 2|导出 2)")).click()


def show_subtitles(page: Any) -> None:
    page.keyboard.press("Escape")
    page.get_by_role("tab").nth(1).click()


def show_place(name: str) -> Callable[[Any], None]:
    def show(page: Any) -> None:
        page.keyboard.press("Escape")
        page.evaluate("(place) => { location.hash = `#/${place}`; }", name)
        page.locator(f"#{name}:not([hidden])").wait_for()

    return show


def show_results(page: Any) -> None:
    page.fill("#library-question", "a red folder")
    page.press("#library-question", "Enter")
    page.locator(".grid canvas[data-drawn]").nth(2).wait_for()


STATES: dict[str, Callable[[Any], None]] = {
    "empty": lambda page: page.locator("#try button").first.wait_for(),
    "answers": lambda page: (open_sample(page), find(page, "the purple cross"), ask(page, "something far away")),
    "moment": lambda page: find(page, "the red circle"),
    "menu": show_menu,
    "export": show_export,
    "subtitles": show_subtitles,
    "details": lambda page: page.get_by_role("tab").last.click(),
    "settings": show_place("settings"),
    "activity": show_place("activity"),
    "library": show_place("library"),
    "results": show_results,
}


@pytest.mark.parametrize(("theme", "language", "size"), CASES)
def test_nothing_is_wrong_with_any_state(
    page: Any, server: MockServer, theme: str, language: str, size: tuple[int, int]
) -> None:
    server.model |= SEARCHING
    server.subtitles = LINES
    server.library = LIBRARY
    page.emulate_media(reduced_motion="reduce")  # colours are measured as they end, not on their way
    page.evaluate(
        "(chosen) => localStorage.setItem('keye.settings', JSON.stringify(chosen))",
        {"theme": theme, "language": language},
    )
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.reload()
    page.wait_for_selector("body[data-ready]")
    least = 44 if size[0] <= 860 else 24
    faults: dict[str, list[str]] = {}
    for name, show in STATES.items():
        show(page)
        if wrong := faults_of(page, least_target=least):
            faults[name] = wrong
    assert faults == {}, json.dumps(faults, indent=1, ensure_ascii=False)


def test_forced_colours_keep_marks_and_choices_visible(page: Any) -> None:
    page.emulate_media(forced_colors="active")
    open_sample(page)
    find(page, "the red circle")
    colors = page.evaluate(
        """() => {
            const style = (query) => getComputedStyle(document.querySelector(query));
            return [style("#moments .pin").backgroundColor, style("#moments").backgroundColor,
                style(".segments input:checked + span").borderTopWidth, style("#moments").borderTopWidth,
                style(".tabs [aria-selected=true]").borderTopWidth];
        }"""
    )
    assert colors[0] != colors[1] and colors[2:] == ["3px", "1px", "3px"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_widest_of_the_usual_fonts_fits(page: Any, size: tuple[int, int]) -> None:
    page.add_init_script("document.addEventListener('DOMContentLoaded', () => {"
                         "document.documentElement.style.setProperty('font-family', 'DejaVu Sans');"
                         "document.body.style.fontFamily = 'DejaVu Sans'; });")  # fmt: skip
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.reload()
    open_sample(page)
    find(page, "the red circle")
    assert [fault for fault in faults_of(page, least_target=24) if fault.startswith(("cut", "overlap"))] == []
