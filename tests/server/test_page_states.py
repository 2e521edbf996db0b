"""What the page says while something is under way or wrong, and that everybody can read and operate it."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from tests.support.mock_server import BROKEN, NOTE, SAMPLE, MockServer
from tests.support.page import THUMBNAILS_DRAWN, ask, choose, find, open_sample, position, show_details

pytestmark = pytest.mark.slow


def video(name: str) -> dict[str, Any]:
    return {"name": name, "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}


@pytest.mark.parametrize(
    ("start", "end", "field", "sentence"),
    [
        ("0:12", "0:03", "end", "The end is before the start, 0:12.0."),
        ("noon", "", "start", "Write seconds, m:ss or h:mm:ss."),
        ("20", "", "start", "The video ends at 0:16.0."),
    ],
)
def test_an_impossible_range_blocks_send_and_takes_the_focus(
    page: Any, server: MockServer, start: str, end: str, field: str, sentence: str
) -> None:
    open_sample(page)
    show_details(page)
    page.fill("#start", start)
    page.fill("#end", end)
    page.get_by_role("tab", name="Answers").click()  # so that the field cannot be seen
    page.fill("#question", "What happens?")
    assert page.get_attribute("#send", "aria-disabled") == "true"
    page.click("#send", force=True)
    assert page.evaluate("document.activeElement.id") == field
    assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    assert sentence in page.inner_text("#sampling-problem") and page.is_visible("#sampling-problem")
    assert server.sent("/v1/video/ground") == [] and page.input_value("#question") == "What happens?"
    page.fill(f"#{field}", "")
    assert page.get_attribute("#send", "aria-disabled") == "false"
    page.click("#send")
    page.locator(".answer[aria-busy=false] .card").wait_for()


def test_a_broken_file_shows_the_sentence_of_the_server(page: Any) -> None:
    page.set_input_files("#choose", [video("broken.mp4")])
    page.locator("#file-states .wrong").wait_for()
    assert f"broken.mp4 cannot be read. {BROKEN}" in page.inner_text("#file-states")
    assert page.get_by_role("button", name="Choose another file").is_visible()
    page.fill("#question", "What happens?")
    page.click("#send")
    assert BROKEN in page.inner_text("#notice") and page.input_value("#question") == "What happens?"


def test_a_question_waits_for_the_upload(page: Any, server: MockServer) -> None:
    server.checking = threading.Event()
    page.set_input_files("#choose", [video("clip.mp4")])
    page.locator("#file-states").get_by_text("checking the file").wait_for()
    page.fill("#question", "the red circle")
    page.press("#question", "Enter")
    page.get_by_text("Your question is asked as soon as the file is ready.").wait_for()
    page.get_by_role("button", name="Take it back").click()
    assert page.input_value("#question") == "the red circle" and page.locator(".turn").count() == 0
    page.press("#question", "Enter")
    server.checking.set()
    page.locator(".answer[aria-busy=false] .card").wait_for()
    assert page.locator(".turn").count() == 1 and len(server.sent("/v1/video/ground")) == 1


def test_a_question_waits_for_the_answer_before_it(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "the slow red circle")
    page.press("#question", "Enter")
    page.get_by_text("32 of 32").wait_for()
    page.fill("#question", "the purple cross")
    page.press("#question", "Enter")
    page.get_by_text("as soon as the answer before it is there").wait_for()
    server.release.set()
    page.get_by_text("Not found in this video.").first.wait_for()
    assert [body["event"] for body in server.sent("/v1/video/ground")] == ["the slow red circle", "the purple cross"]


def test_a_waiting_question_comes_back_where_the_file_is_refused(page: Any, server: MockServer) -> None:
    server.checking = threading.Event()
    page.set_input_files("#choose", [video("broken.mp4")])
    page.fill("#question", "What happens?")
    page.press("#question", "Enter")
    page.get_by_text("as soon as the file is ready").wait_for()
    server.checking.set()
    page.locator("#notice").get_by_text(BROKEN).wait_for()
    assert page.input_value("#question") == "What happens?" and page.locator(".turn").count() == 0


def test_the_moment_comes_first_and_plays_to_its_end(page: Any, server: MockServer) -> None:
    open_sample(page)
    turn = ask(page, "When is the red circle visible?")
    assert position(page) == pytest.approx(3.0, abs=0.01), "the player shows the first moment"
    first, second = turn.locator(".card"), turn.locator(".row-of")
    assert first.locator(".range").inner_text() == "0:03.0\u2009\u2013\u20090:08.5" and "5.5 s" in first.inner_text()
    assert second.locator(".range").inner_text() == "0:12.0\u2009\u2013\u20090:15.5"
    assert turn.locator(".meter").count() == 0, "the server sent no probability"
    second.get_by_role("button", name="Play the moment").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("button", name="Play", exact=True).wait_for()
    assert position(page) == pytest.approx(15.5, abs=0.45), "it stops at the end of the moment"
    with page.expect_download() as saved:
        first.get_by_role("button", name="Save the clip").click()
    assert saved.value.suggested_filename == "sample-0m03.0-0m08.5.mp4"
    assert server.sent("/v1/clips") == [{"file_id": "file-0", "intervals": [[3.0, 8.5]]}]
    choose(turn, "Use as range")
    assert page.inner_text("#range-text") == "0:03.0 to 0:08.5 only"


def test_find_shows_the_moment_and_the_reply_only_in_details(page: Any) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    assert turn.locator(".card").count() == 1
    assert "[[" not in turn.inner_text() and turn.locator(".answer-text").is_hidden()
    turn.get_by_role("button", name="Why this answer").click()
    assert page.get_by_role("tab", name="Details").get_attribute("aria-selected") == "true"
    details = page.inner_text("#why")
    assert "[[3.0, 8.5]]" in details and "636 in, 7 out, of 8,192" in details and "32 frames, 224 \u00d7 224" in details
    assert page.locator(".shots button").count() == 5 and "9%, 2.9\u00d7" in page.inner_text(".shots")


def test_nothing_found_is_an_answer_with_ways_on(page: Any) -> None:
    open_sample(page)
    turn = find(page, "the purple cross")
    assert turn.get_by_role("button", name="Try again").count() == 0
    assert turn.get_by_role("button", name="Search more closely").count() == 0, "this server cannot search"
    turn.get_by_role("button", name="Use other words").click()
    assert page.input_value("#question") == "the purple cross"
    assert page.evaluate("document.activeElement.id") == "question"


def test_the_menu_is_operated_with_keys(page: Any) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    opener = turn.get_by_role("button", name="More", exact=True)
    opener.focus()
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.querySelector('span')?.textContent"
    assert page.evaluate(focused) == "Search inside this moment" and opener.get_attribute("aria-expanded") == "true"
    page.keyboard.press("End")
    assert page.evaluate(focused) == "Delete this answer"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "Search inside this moment"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "More"
    assert page.get_by_role("menu").count() == 0


def test_notes_on_file_and_answer_are_shown(page: Any) -> None:
    open_sample(page)
    show_details(page)
    assert page.inner_text("#plan-notes") == "the file has 2 video tracks; the second is read"
    note = ask(page, "something far away").locator(".note.warn").inner_text()
    assert f"The reply named a time that was not looked at. {NOTE}" == note


def test_a_reply_that_repeats_itself_is_said_to(page: Any) -> None:
    open_sample(page)
    turn = ask(page, "a loop, please")
    assert "stopped: it repeated itself" in turn.inner_text()
    turn.get_by_role("button", name="Ask in other words").click()
    assert page.input_value("#question") == "a loop, please"


def test_the_empty_page_shows_the_model_and_questions_about_the_sample(page: Any) -> None:
    assert page.inner_text("#model .chip") == "drawn shapes only"
    assert "It learned from drawn films of coloured shapes, up to 64 frames." in page.inner_text("#about")
    assert "fits here" in page.inner_text("#about") and "keye serve 1.5" in page.inner_text("#about")
    page.get_by_role("button", name="Find the red circle").click()
    page.locator(".answer[aria-busy=false] .card").wait_for()
    assert page.inner_text(".question") == "the red circle"


def test_a_model_without_a_scope_gets_no_chip_and_no_sentence(page: Any, server: MockServer) -> None:
    server.model = {}
    page.reload()
    page.locator("#model:not([hidden])").wait_for()
    assert page.locator("#model .chip").count() == 0
    assert page.locator("#about h2").all_inner_texts() == ["Good to know"]


def test_a_question_beyond_what_the_model_was_measured_on_offers_find(page: Any, server: MockServer) -> None:
    server.model |= {"measured_frames": 16}
    page.reload()
    open_sample(page)
    page.check("input[name=mode][value=ask]", force=True)
    page.get_by_text("keye-nano was measured on up to 16 frames; this is longer.").wait_for()
    page.get_by_role("button", name="Use Find").click()
    assert page.is_checked("input[name=mode][value=find]") and page.is_hidden("#beyond")


def test_a_screen_reader_is_told_the_answer_once(page: Any) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    assert turn.locator(".answer > p").inner_text() == "1 moment, 0:03.0 to 0:08.5"
    live = turn.evaluate("(node) => [...node.querySelectorAll('.turn-body')].map((part) => part.ariaLive)")
    assert set(live) == {"off"}, "the card is not read out with every button"


def test_answers_are_read_aloud_when_they_are_complete(page: Any, server: MockServer) -> None:
    open_sample(page)
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    page.fill("#question", "a slow one")
    page.press("#question", "Control+Enter")
    page.locator(".answer-text").get_by_text("The red circle").wait_for()
    assert log.locator(".answer").get_attribute("aria-busy") == "true"
    server.release.set()
    log.locator(".answer[aria-busy=false]").wait_for()


def test_labels_of_the_axis_do_not_overlap(page: Any) -> None:
    open_sample(page)
    for width in (1280, 700, 390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        for _ in range(100):  # frames; the new size arrives within a few
            boxes, right_edge = page.evaluate(
                """async () => {
                    await new Promise(requestAnimationFrame);
                    const labels = [...document.querySelectorAll("#axis span")];
                    const boxes = labels.map((one) => one.getBoundingClientRect());
                    const edge = document.getElementById("axis").getBoundingClientRect().right;
                    return [boxes.map((box) => [box.left, box.right]), edge];
                }"""
            )
            apart = all(right < left for (_, right), (left, _) in itertools.pairwise(boxes))
            if apart and boxes[-1][1] <= right_edge + 0.5 and right_edge <= width:
                break
        assert apart and len(boxes) >= 2 and boxes[-1][1] <= right_edge + 0.5


def test_pictures_of_the_timeline_are_not_cropped(page: Any) -> None:
    """The sample is square and grey to its edges: a column in the gap between two pictures is clear, one in the middle
    of a picture is grey from top to bottom."""
    open_sample(page)
    page.wait_for_selector(THUMBNAILS_DRAWN)
    edges = page.evaluate(
        """() => {
            const canvas = document.getElementById("pictures");
            const line = canvas.getContext("2d").getImageData(0, 4, canvas.width, 1).data;
            const edges = [];
            for (let x = 1; x < canvas.width; x++) {
                if ((line[4 * x + 3] > 0) !== (line[4 * x - 1] > 0)) edges.push(x);
            }
            return [canvas.height, edges];
        }"""
    )
    height, at = edges
    widths = [right - left for left, right in zip(at[::2], at[1::2], strict=False)]
    assert len(widths) > 8 and all(width == pytest.approx(height, abs=2) for width in widths), "each is square"


def test_a_phone_on_its_side_shows_video_and_answer_together(page: Any) -> None:
    page.set_viewport_size({"width": 844, "height": 390})
    open_sample(page)
    card = ask(page, "When is the red circle visible?").locator(".card").bounding_box()
    video_box = page.locator("#video").bounding_box()
    assert video_box["y"] >= 0 and video_box["y"] + video_box["height"] <= 390
    assert card["x"] > video_box["x"] + video_box["width"] and card["y"] + card["height"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 844
