"""The page in a real browser, against a mock server: from a dropped video to a clip, and what can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.mock_server import CIRCLE, HOSTILE, SAMPLE, MockServer
from tests.support.page import THUMBNAILS_DRAWN, ask, choose, open_sample, position

pytestmark = pytest.mark.slow


def test_a_question_is_answered_with_marks_evidence_and_clips(page: Any, server: MockServer) -> None:
    open_sample(page)
    assert "32 frames · 620 tokens · 7.6 % of the context of 8,192" in page.inner_text("#plan-summary")
    page.wait_for_selector(THUMBNAILS_DRAWN)
    turn = ask(page, "When is the red circle visible?")
    displayed = CIRCLE.replace("[[3.0, 8.5]]", "0:03.0 to 0:08.5").replace("[[12.0, 15.5]]", "0:12.0 to 0:15.5")
    assert turn.locator(".answer-text").inner_text() == displayed
    assert page.locator(".bar").count() == 2
    assert page.locator(".bar").last.get_attribute("aria-label") == "Jump to 0:12.0 to 0:15.5: red circle again"
    turn.locator(".answer-text .mark").first.click()
    assert position(page) == pytest.approx(3.0, abs=0.01)
    page.hover("#evidence", position={"x": 5, "y": 5})
    displayed = "frame at 0:00.0: 0.2 % of the indexer's selections, 0.1 times an even share"
    assert displayed in page.inner_text("#preview-text")
    with page.expect_download() as saved:
        choose(turn, "Save all clips")
    assert saved.value.suggested_filename == "sample-clips.zip"
    assert server.sent("/v1/clips") == [{"file_id": "file-0", "intervals": [[3.0, 8.5], [12.0, 15.5]]}]


def test_keys_step_between_marks_and_set_the_range(page: Any) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    assert position(page) == pytest.approx(3.0, abs=0.01), "the first moment of the answer"
    page.press("#question", "Escape")
    page.keyboard.press("[")
    page.keyboard.press("ArrowRight")
    assert position(page) == pytest.approx(12.0, abs=0.01)
    page.keyboard.press("]")
    assert page.inner_text("#range-text") == "Asks about 0:03.0 to 0:12.0"
    page.keyboard.press("j")
    assert position(page) == pytest.approx(3.0, abs=0.01)
    page.keyboard.press(" ")
    page.get_by_role("button", name="Pause").wait_for()


def test_a_range_drawn_on_the_timeline_is_sent_with_the_next_question(page: Any, server: MockServer) -> None:
    open_sample(page)
    box = page.locator("#track").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10, steps=4)
    page.mouse.up()
    page.click("#advanced summary")
    page.fill("#fps", "2")
    ask(page, "What happens here?")
    video = server.sent("/v1/chat/completions")[0]["messages"][0]["content"][0]["video_url"]
    assert video == {"url": "file-0", "fps": 2, "video_start": 4, "video_end": 8}


def test_a_follow_up_goes_on_and_the_history_brings_it_back(page: Any, server: MockServer) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    ask(page, "And what else?")
    roles = [message["role"] for message in server.sent("/v1/chat/completions")[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.reload()
    page.click("#open-history")
    page.locator("#history-list .name").click()
    page.wait_for_selector(THUMBNAILS_DRAWN)
    assert page.locator(".turn").count() == 2 and page.locator(".bar").count() == 2
    ask(page, "And then?")
    assert len(server.sent("/v1/chat/completions")[2]["messages"]) == 5
    stored = page.evaluate("localStorage.getItem('keye.history')")
    assert CIRCLE in stored and len(stored) < 10_000, "text is kept, the video is not"
    page.click("#open-history")
    page.get_by_role("button", name="Delete When").click()
    assert page.locator("#history-empty").is_visible()


def test_find_marks_the_moments_of_an_event(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.get_by_text("Find", exact=True).click()
    ask(page, "the red circle")
    assert server.sent("/v1/video/ground") == [
        {"model": "keye-nano", "video": {"type": "video_url", "video_url": {"url": "file-0"}},
         "event": "the red circle", "stream": True, "evidence": True},
    ]  # fmt: skip
    assert page.locator(".bar").count() == 1


def test_find_says_how_far_it_has_come(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.get_by_text("Find", exact=True).click()
    page.fill("#question", "the slow red circle")
    page.keyboard.press("Enter")
    page.get_by_text("32 of 32").wait_for()
    assert page.get_by_role("progressbar", name="Opening the media").is_visible()
    server.release.set()
    page.locator(".bar").wait_for()


def test_the_timeline_shows_a_part_larger(page: Any) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    page.click("#advanced summary")
    page.fill("#start", "0:02")
    page.fill("#end", "6")
    page.click("#zoom-in")
    left = page.locator(".bar").evaluate_all("(bars) => bars.map((bar) => bar.style.left)")
    assert left == ["25%"], "3.0 s of the part from 2 to 6 s; the other interval is outside"
    page.click("#zoom-all")
    assert page.locator(".bar").count() == 2 and page.locator("#zoom-out").is_disabled()


def test_a_request_is_copied_as_a_command_line_without_the_key(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.evaluate("sessionStorage.setItem('keye.key', 'secret')")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_sample(page)
    turn = ask(page, "What's in it?")
    choose(turn, "Copy as curl")
    turn.get_by_text("Copied").wait_for()
    line = page.evaluate("navigator.clipboard.readText()")
    assert line.startswith(f"curl -N '{server.address}v1/chat/completions'")
    assert "Bearer $KEYE_API_KEY" in line and "secret" not in line and "What'\\''s in it?" in line


def test_settings_are_sent_and_kept(page: Any, server: MockServer) -> None:
    page.click("#open-settings")
    page.fill("#temperature", "0.5")
    page.select_option("#thinking", "off")
    page.uncheck("#want-evidence")
    page.select_option("#theme", "dark")
    page.get_by_role("button", name="Done").click()
    page.reload()
    open_sample(page)
    ask(page, "When?")
    request = server.sent("/v1/chat/completions")[0]
    assert request["temperature"] == 0.5 and request["keye"] == {"evidence": False, "progress": True}
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_stop_ends_the_request_and_keeps_what_came(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "a slow one")
    page.press("#question", "Enter")
    page.locator(".answer-text").get_by_text("The red circle").wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    page.click("#stop")
    page.get_by_text("Stopped.").wait_for()
    assert server.disconnected.wait(20), "the server sees that the client is gone"
    assert "The red circle" in page.inner_text(".answer-text")
    assert page.locator("#send").is_visible()


def test_a_stream_that_is_cut_says_so_and_keeps_what_came(page: Any) -> None:
    open_sample(page)
    turn = ask(page, "cut it")
    assert "The answer broke off before its end." in turn.inner_text()
    assert "The red circle" in turn.inner_text()


def test_a_busy_server_is_asked_again_without_typing_again(page: Any) -> None:
    open_sample(page)
    turn = ask(page, "busy?")
    assert "32 requests wait already. Try again in 7 s." in turn.inner_text()
    assert page.input_value("#question") == "busy?"
    turn.get_by_role("button", name="Try again").click()
    page.locator(".answer-text .mark").first.wait_for()
    assert page.locator(".turn").count() == 1 and page.input_value("#question") == ""


def test_the_key_is_asked_for_once_and_kept_in_the_tab(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.click("#sample")
    page.fill("#key-input", "wrong")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("The server does not know this key.").wait_for()
    page.fill("#key-input", "secret")
    page.get_by_role("button", name="Go on").click()
    page.wait_for_selector("#plan-meter:not([hidden])")
    turn = ask(page, "When?")
    assert turn.locator(".mark").count() > 0
    assert page.evaluate("JSON.stringify(localStorage)").find("secret") == -1


def test_a_key_can_be_given_later_in_the_settings(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.click("#sample")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Upload again").wait_for()
    page.fill("#question", "When?")
    page.click("#send")
    assert "Enter the key under Settings." in page.inner_text("#notice")
    page.click("#open-settings")
    page.fill("#key-field", "secret")
    page.get_by_role("button", name="Done").click()
    page.wait_for_selector("#plan-meter:not([hidden])")
    assert page.input_value("#question") == "When?"


def test_a_dropped_video_is_played_and_uploaded(page: Any, server: MockServer) -> None:
    data = page.evaluate_handle(
        """async () => {
            const data = new DataTransfer();
            const clip = await (await fetch("static/sample.mp4")).blob();
            data.items.add(new File([clip], "dropped.mp4", {type: "video/mp4"}));
            return data;
        }"""
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    page.wait_for_selector("#plan-meter:not([hidden])")
    assert page.inner_text("#tray .name") == "dropped.mp4"
    assert server.contents["file-0"] == SAMPLE.read_bytes()


@pytest.mark.parametrize(("question", "bars"), [("hostile", 2), ("hostile evil", 1)])
def test_hostile_answers_stay_text(page: Any, question: str, bars: int) -> None:
    open_sample(page)
    turn = ask(page, f"{question} <img src=x onerror=window.hacked=1>")
    displayed = turn.locator(".answer-text").inner_text()
    assert displayed == HOSTILE.replace("[[3.0, 8.5]]", "0:03.0 to 0:08.5")
    assert turn.locator("img, script, svg, a, b").count() == 0
    assert page.locator(".bar").count() == bars, "what is not an interval is not drawn"


def test_hostile_file_names_stay_text(page: Any) -> None:
    name = "<img src=x onerror=window.hacked=1>'\";.mp4"
    video = {"name": name, "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}
    page.set_input_files("#choose", [video])
    page.wait_for_selector("#plan-meter:not([hidden])")
    assert page.inner_text("#tray .name") == name
    assert page.locator("#tray img").count() == 0


def test_places_are_drawn_over_a_picture(page: Any, tmp_path: Path) -> None:
    page.screenshot(path=tmp_path / "picture.png")
    page.set_input_files("#choose", [tmp_path / "picture.png"])
    page.wait_for_selector("#tray progress", state="detached")
    empty = page.evaluate("document.getElementById('regions').toDataURL()")
    turn = ask(page, "box of the dog")
    assert turn.locator(".answer-text").inner_text() == "A dog 1."
    assert page.evaluate("document.getElementById('regions').toDataURL()") != empty


def test_a_format_that_the_browser_cannot_play_is_still_asked_about(page: Any) -> None:
    video = {"name": "strange.mkv", "mimeType": "video/x-matroska", "buffer": b"no video"}
    page.set_input_files("#choose", [video])
    page.get_by_text("This browser cannot play this format. keye can read it: ask as usual.").wait_for()
    page.wait_for_selector("#timeline:not([hidden])")
    assert ask(page, "When?").locator(".mark").count() > 0
    assert page.locator(".bar").count() == 2


def test_a_server_that_is_gone_loses_no_input(page: Any, server: MockServer) -> None:
    open_sample(page)
    server.close()
    turn = ask(page, "Are you there?")
    assert "The server cannot be reached. See whether keye serve is still running." in turn.inner_text()
    assert page.input_value("#question") == "Are you there?"


def test_a_phone_shows_everything_without_scrolling_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    open_sample(page)
    ask(page, "When is the red circle visible?")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    note = ask(page, "busy?").locator(".note").bounding_box()
    composer = page.locator("#composer").bounding_box()
    assert note["y"] > 0 and note["y"] + note["height"] <= composer["y"], "the error is not hidden by the field below"


def test_every_control_has_a_name(page: Any) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role=slider], canvas[role=img]")]
            .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length))
            .map((node) => node.outerHTML)"""
    )
    assert nameless == []
