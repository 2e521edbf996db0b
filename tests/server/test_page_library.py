"""The library in the page: states of videos, a search over all of them, results that are chosen and exported."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.mock_server import LIBRARY, SEARCHING, MockServer

pytestmark = pytest.mark.slow


@pytest.fixture
def library(page: Any, server: MockServer) -> MockServer:
    """The place of the library, on a server that has one."""
    server.model |= SEARCHING
    server.library = LIBRARY
    page.goto(server.address + "#/library")
    page.reload()
    page.locator("#library .list li").nth(3).wait_for()
    return server


def test_each_video_says_its_state(page: Any, library: MockServer) -> None:
    rows = page.locator("#library .list li").all_inner_texts()
    assert "Ready" in rows[0] and "2:04:18" in rows[0] and "1.1 GB" in rows[0]
    assert "Indexing" in rows[1] and "searchable up to 1:20:00" in rows[1] and "42%, 6 min left" in rows[1]
    assert "Waiting" in rows[2]
    assert "Not readable" in rows[3] and "the file is cut short: its index is missing" in rows[3]
    assert "Indexes use 3.1 GB of 20.0 GB" in page.inner_text("#library")
    assert page.get_attribute("#library-question", "placeholder") == "Find in 5 hours of video"
    page.get_by_role("radio", name="Not readable").check()
    page.locator("#library .list li").nth(1).wait_for(state="detached")
    assert "interview" in page.inner_text("#library .list")


def test_results_of_all_videos_are_chosen_and_exported(page: Any, library: MockServer) -> None:
    page.fill("#library-question", "someone holds up a red folder")
    page.press("#library-question", "Enter")
    page.locator(".grid li").nth(2).wait_for()
    assert page.url.endswith("#/library?q=someone+holds+up+a+red+folder")
    assert library.sent("/v1/library/find")[0]["event"] == "someone holds up a red folder"
    line = page.inner_text("#library")
    assert "2 found" in line and "in 9.6 of 11.6 hours." in line and "1 video not searched." in line
    page.locator(".grid canvas[data-drawn]").nth(2).wait_for()
    page.locator("#results-level").select_option("0.7")
    page.locator(".grid li").nth(2).wait_for(state="detached")
    page.locator("#choose-0").click()
    page.locator("#choose-1").click(modifiers=["Shift"])
    assert page.locator(".grid .chosen").count() == 2
    page.get_by_role("button", name="Export 2 moments").click()
    with page.expect_download():
        page.locator("#export").get_by_role("button", name="Save").click()
    request = library.sent("/v1/video/export")[0]
    assert request["videos"] == {"library-0": {"file_id": "library-0"}, "library-1": {"file_id": "library-1"}}
    assert [moment["file"] for moment in request["moments"]] == ["library-0", "library-1"]
    assert len(library.sent("/v1/library/find")) == 1, "choosing asks nothing again"


def test_a_result_opens_on_the_desk_at_its_moment(page: Any, library: MockServer) -> None:
    page.goto(library.address + "#/library?q=x&order=video")
    page.locator(".grid li").nth(2).wait_for()
    page.locator(".grid .shot").first.click()
    page.locator("#file-name", has_text="Council meeting 14 May.mp4").wait_for()
    page.wait_for_selector("#timeline:not([hidden])")
    assert page.input_value("#question") == "x" and library.sent("/v1/video/find") == []


def test_findings_come_while_the_library_is_searched(page: Any, library: MockServer) -> None:
    page.fill("#library-question", "slow")
    page.press("#library-question", "Enter")
    page.locator(".grid li").wait_for()
    assert page.inner_text("#running") == "1 running" and "25%" in page.inner_text("#library")
    page.get_by_role("button", name="Stop, keep these").click()
    page.locator(".grid li").nth(2).wait_for()
    assert ("POST", "/v1/video/find/find-2/stop", {}) in library.requests


def test_a_server_without_a_library_says_how_to_start_one(page: Any, server: MockServer) -> None:
    page.goto(server.address + "#/library")
    page.get_by_text("keye serve --library").wait_for()
    assert page.locator("#library-question").count() == 0
