"""Searching in the page: findings as they come, what a search looked at, subtitles, scenes, exports, and pictures from
the server, with scripted events of a server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.mock_server import LINES, SEARCHING, MockServer, moment, search_events
from tests.support.page import find, open_sample, position

pytestmark = pytest.mark.slow


@pytest.fixture
def searching(page: Any, server: MockServer) -> MockServer:
    """The page on a server that searches."""
    server.model |= SEARCHING
    page.reload()
    page.wait_for_selector("body[data-ready]")
    return server


def test_findings_come_ranked_while_the_search_goes_on(page: Any, searching: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "the slow red circle")
    page.press("#question", "Enter")
    turn = page.locator(".turn")
    turn.locator(".card").wait_for()
    assert turn.get_by_role("progressbar").get_attribute("aria-label") == "Looking through the whole video"
    assert "60%" in turn.inner_text() and "possible" in turn.inner_text() and "not checked yet" in turn.inner_text()
    assert "Seen up to 0:08. 1 place so far." in turn.inner_text()
    assert page.locator("#moments .pin.hollow").count() == 1 and page.inner_text("#running") == "1 running"
    assert turn.locator(".range").inner_text() == "0:03\u2009\u2013\u20090:08", "borders that were not refined"
    assert position(page) == pytest.approx(3.0, abs=0.01), "it can be looked at before the search ends"
    assert page.inner_text("#status") == "1 moment, 0:03 to 0:08, 60%, possible"
    turn.get_by_role("button", name="Stop, keep these").click()
    turn.get_by_text("Done in").wait_for()
    assert ("POST", "/v1/video/find/find-1/stop", {}) in searching.requests
    assert (
        "94%" in turn.inner_text() and "checked twice" in turn.inner_text() and "starts at a cut" in turn.inner_text()
    )
    assert "In this red folder." in turn.inner_text() and turn.locator(".row-of:visible").count() == 1
    assert searching.sent("/v1/video/find") == [
        {"model": "keye-nano", "video": {"type": "video_url", "video_url": {"url": "file-0"}},
         "event": "the slow red circle", "stream": True},
    ]  # fmt: skip


def test_what_was_searched_is_said_and_weaker_places_are_folded(page: Any, searching: MockServer) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    assert turn.locator(".answer > p").inner_text() == "2 moments, 0:03.0 to 0:08.5, 94%, very likely"
    assert page.locator("#moments .pin").count() == 3 and page.locator("#moments .pin.dot").count() == 1
    assert page.locator("#lane-seen").is_visible()
    turn.get_by_role("button", name="1 weaker place 38%, did not pass the check").click()
    assert "0:10" in turn.locator(".row-of:visible").last.inner_text()
    turn.get_by_role("button", name="How it was searched").click()
    text = turn.inner_text()
    assert "Every second has been seen at least once. 12 places were looked at closely." in text
    assert "8,226 frames" in text and "61,240 (11% of the index)" in text
    turn.get_by_role("button", name="From 50%").click()
    page.get_by_role("menuitemradio", name="From 90%").click()
    assert turn.locator(".row-of:visible").count() == 0 and page.locator("#moments .pin.dot").count() == 2


def test_what_the_model_does_not_know_is_said_with_a_way_on(page: Any, searching: MockServer) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    assert "This may be outside what the model knows. keye-nano does not know real footage." in turn.inner_text()
    turn.get_by_role("button", name="See models for footage").click()
    assert "keye serve 1.5" in page.inner_text("#model-box")


def test_not_found_after_a_search_says_what_was_looked_at(page: Any, searching: MockServer) -> None:
    open_sample(page)
    turn = find(page, "the purple cross")
    text = turn.locator(".note").first.inner_text()
    assert "Not found in this video." in text and "Chance that it is there: 2%." in text
    turn.get_by_role("button", name="Search more closely").click()
    page.locator(".turn").nth(1).locator(".answer[aria-busy=false] .note").first.wait_for()
    assert [body.get("effort") for body in searching.sent("/v1/video/find")] == [None, "high"]
    assert page.get_by_role("button", name="Search more closely").count() == 1, (
        "nothing searches more closely than that"
    )


def test_a_part_that_was_not_looked_at_is_said(page: Any, searching: MockServer) -> None:
    events = search_events("x")
    events[-1]["result"] |= {"moments": [], "weaker": [], "presence": 0.2}
    events[-1]["result"]["coverage"] |= {"unseen": [[8.0, 16.0]], "share": 0.5}
    searching.search = events
    open_sample(page)
    turn = find(page, "x")
    assert "50% of it was looked at." in turn.inner_text()
    assert page.locator("#legend", has_text="not looked at").count() == 1


def test_a_thousand_candidates_are_few_elements(page: Any, searching: MockServer) -> None:
    events = search_events("many")
    events[-1]["result"]["weaker"] = [moment(rank, rank / 70, rank / 70 + 0.2, 0.1) for rank in range(3, 1003)]
    searching.search = events
    open_sample(page)
    find(page, "many")
    page.locator("#moments .pin").nth(3).wait_for()
    assert page.evaluate("document.querySelectorAll('#timeline *').length") < 200
    several = page.get_by_role("button", name="moments here").first
    several.click()
    page.locator("#lane-whole").wait_for()


def test_strange_events_are_left_out(page: Any, searching: MockServer) -> None:
    evil = "<img src=x onerror=window.hacked=1>"
    searching.search = [
        {"type": "progress", "stage": evil}, {"type": "moments", "moments": [{"start": "x"}, None, 7]},
        {"type": "progress", "stage": "coarse", "done": 1e9, "total": -1, "unit": evil}, {"type": evil}, [], None,
        {"type": "result", "result": {
            "moments": [moment(1, 3, 8, 7.0, subtitle={"start": 1, "end": 2, "text": evil}, file=evil)],
            "coverage": {"duration": 16, "seen": evil}, "notes": [{"text": evil}], "seconds": evil, "threshold": evil,
        }},
    ]  # fmt: skip
    open_sample(page)
    turn = find(page, "x")
    assert evil in turn.inner_text() and turn.locator("img").count() == 0 and turn.locator(".meter").count() == 0


def test_the_record_of_a_search_is_saved_from_details(page: Any, searching: MockServer) -> None:
    open_sample(page)
    find(page, "the red circle").get_by_text("Done in").wait_for()
    page.get_by_role("tab", name="Details").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save record").click()
    assert saved.value.suggested_filename == "sample-record.html"
    assert ("GET", "/v1/video/find/find-1/record", None) in searching.requests


def test_moments_are_exported_for_an_editor(page: Any, searching: MockServer) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    turn.get_by_role("button", name="Export 2 moments").click()
    dialog = page.locator("#export")
    assert "at most 250 ms from the answer" in dialog.inner_text(), "the sample has two frames a second"
    dialog.get_by_label("Frame rate").select_option("29.97df")
    assert "at most 17 ms from the answer" in dialog.inner_text()
    dialog.get_by_label("First timecode").fill("10:00:00;00")
    dialog.get_by_label("Written as").select_option("markers")
    with page.expect_download() as saved:
        dialog.get_by_role("button", name="Save the-red-circle.xml").click()
    assert saved.value.suggested_filename == "the red circle.xml"
    page.get_by_text("Saved. Times fall on whole frames").first.wait_for()
    request = searching.sent("/v1/video/export")[0]
    assert request["video"] == {"file_id": "file-0"} and request["format"] == "fcp7" and request["mode"] == "markers"
    assert request["rate"] == "29.97df" and request["start_timecode"] == "10:00:00;00" and request["handles"] == [1, 1]
    assert [(sent["start"], sent["end"], sent["probability"]) for sent in request["moments"]] == [
        (3, 8.5, 0.94),
        (12, 15, 0.71),
    ]
    turn.get_by_role("button", name="Export 2 moments").click()
    dialog.get_by_role("radio", name="Clips with sound").check()
    assert dialog.get_by_label("Frame rate").count() == 0
    with page.expect_download():
        dialog.get_by_role("button", name="Save the-red-circle.zip").click()
    assert searching.sent("/v1/clips") == [{"file_id": "file-0", "intervals": [[2, 9.5], [11, 16]]}]


def test_subtitles_are_read_searched_and_follow_the_video(page: Any, searching: MockServer) -> None:
    searching.subtitles = LINES
    open_sample(page)
    page.get_by_role("tab", name="Subtitles").click()
    assert page.locator(".timed li").count() == 3 and "3 lines, en, from the video" in page.inner_text(
        "#panel-subtitles"
    )
    assert page.locator("#lane-subtitles").is_visible()
    assert page.get_attribute("#question", "placeholder") == "Find in picture and subtitles"
    page.get_by_role("searchbox", name="Search the subtitles").fill("RED folder")
    assert page.locator("mark").all_inner_texts() == ["red folder", "red folder"]
    assert page.inner_text("#subtitle-count") == "1 of 2"
    page.get_by_role("button", name="Match after").click()
    assert page.inner_text("#subtitle-count") == "2 of 2" and position(page) == pytest.approx(9.0, abs=0.01)
    page.locator(".timed li").nth(1).get_by_role("button").click()
    page.locator(".timed li.current", has_text="In this red folder.").wait_for()
    page.get_by_role("button", name="Subtitles on the video").click()
    assert page.inner_text("#caption") == "In this red folder."
    page.hover(".timed")
    page.mouse.wheel(0, 50)
    page.locator("#follow[aria-checked=false]").wait_for()


def test_a_subtitle_file_is_dropped_and_searched(page: Any, searching: MockServer) -> None:
    open_sample(page)
    assert page.get_by_role("tab", name="Subtitles").count() == 0
    text = "1\n00:00:01,000 --> 00:00:02,000\nhello\n"
    page.set_input_files("#choose-more", [{"name": "a.srt", "mimeType": "text/plain", "buffer": text.encode()}])
    page.get_by_role("tab", name="Subtitles").wait_for()
    find(page, "the red circle")
    assert searching.sent("/v1/video/find")[0]["subtitles"] == {"text": text}


def test_scenes_are_found_when_asked_for(page: Any, searching: MockServer) -> None:
    open_sample(page)
    assert searching.sent("/v1/video/scenes") == []
    page.get_by_role("button", name="More for this file").click()
    page.get_by_role("menuitem", name="Find scenes").click()
    page.get_by_role("tab", name="Scenes 3").click()
    page.locator(".scenes-list canvas[data-drawn]").nth(2).wait_for()
    page.get_by_role("button", name="Scene 3, from 0:09.5").click()
    assert position(page) == pytest.approx(9.5, abs=0.01)


def test_a_format_that_the_browser_cannot_play_is_shown_from_the_server(page: Any, searching: MockServer) -> None:
    video = {"name": "strange.mkv", "mimeType": "video/x-matroska", "buffer": b"no video"}
    page.set_input_files("#choose", [video])
    page.locator("#still[data-drawn]").wait_for()
    page.wait_for_selector("#pictures[data-drawn=yes]")
    turn = find(page, "the red circle")
    turn.locator(".card canvas[data-drawn]").wait_for()
    assert page.locator("#time b").inner_text() == "0:03.0"
    assert all(len(body["times"]) <= 60 for body in searching.sent("/v1/video/frames"))


def test_a_server_that_cannot_search_gets_no_part_of_it(page: Any, server: MockServer) -> None:
    server.model |= {"measured_frames": 8}
    page.reload()
    open_sample(page)
    turn = find(page, "the red circle")
    assert len(server.sent("/v1/video/ground")) == 1 and server.sent("/v1/video/find") == []
    assert turn.get_by_role("button", name="Export").count() == 0
    page.get_by_role("button", name="More for this file").click()
    assert page.get_by_role("menuitem", name="Find scenes").count() == 0
