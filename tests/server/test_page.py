"""The page in a real browser, against a mock server: from a dropped video to a clip, and what can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.mock_server import CIRCLE, HOSTILE, SAMPLE, MockServer
from tests.support.page import THUMBNAILS_DRAWN, ask, choose, find, open_sample, position, show_details

pytestmark = pytest.mark.slow


def test_a_question_is_answered_with_marks_evidence_and_clips(page: Any, server: MockServer) -> None:
    open_sample(page)
    assert "32 frames, 620 tokens, 8% of what fits" in page.text_content("#plan-summary")
    page.wait_for_selector(THUMBNAILS_DRAWN)
    turn = ask(page, "When is the red circle visible?")
    displayed = CIRCLE.replace("[[3.0, 8.5]]", "0:03.0 to 0:08.5").replace("[[12.0, 15.5]]", "0:12.0 to 0:15.5")
    assert turn.locator(".answer-text").inner_text() == displayed
    assert page.locator("#moments .pin").count() == 2
    assert page.locator("#moments .pin").last.get_attribute("aria-label") == (
        "2, moment from 0:12.0 to 0:15.5, red circle again"
    )
    turn.locator(".answer-text canvas[data-drawn]").nth(2).wait_for()
    turn.locator(".answer-text .time-link").first.click()
    assert position(page) == pytest.approx(3.0, abs=0.01)
    page.hover("#lane-evidence .lane-body", position={"x": 5, "y": 5})
    displayed = "frame looked at: 0.2% of the attention, 0.1 times an even share"
    assert displayed in page.inner_text("#preview-text")
    with page.expect_download() as saved:
        turn.get_by_role("button", name="Other ways to save").click()
        turn.get_by_role("menuitem", name="All clips, ZIP").click()
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
    page.keyboard.press("o")
    assert page.inner_text("#range-text") == "0:03.0 to 0:12.0 only"
    page.keyboard.press("Backspace")
    assert page.is_hidden("#range-chip")
    page.keyboard.press("j")
    assert position(page) == pytest.approx(7.0, abs=0.01)
    page.keyboard.press("1")
    assert position(page) == pytest.approx(3.0, abs=0.01)
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press(".")
    assert position(page) == pytest.approx(8.5, abs=0.01), "the sample has two frames a second"
    page.keyboard.press(" ")
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("k")
    page.keyboard.press("t")
    assert page.get_by_role("tab", name="Details").get_attribute("aria-selected") == "true"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible() and page.locator("#keys dt").count() == page.locator("#keys dd").count()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.locator("#library").wait_for()
    assert page.evaluate("location.hash") == "#/library"


def test_single_keys_can_be_switched_off(page: Any) -> None:
    open_sample(page)
    page.goto(page.url.split("#")[0] + "#/settings")
    page.get_by_role("switch", name="Single-key shortcuts").click()
    page.get_by_role("link", name="Desk", exact=True).click()
    page.locator("#timeline").click(position={"x": 600, "y": 20})
    before = position(page)
    page.keyboard.press("j")
    assert position(page) == before


def test_a_range_drawn_on_the_timeline_is_sent_with_the_next_question(page: Any, server: MockServer) -> None:
    open_sample(page)
    box = page.locator("#track").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10, steps=4)
    page.mouse.up()
    assert page.inner_text("#range-text") == "0:04.0 to 0:08.0 only"
    show_details(page)
    page.fill("#fps", "2")
    ask(page, "What happens here?")
    video = server.sent("/v1/chat/completions")[0]["messages"][0]["content"][0]["video_url"]
    assert video == {"url": "file-0", "fps": 2, "video_start": 4, "video_end": 8}


def test_a_follow_up_goes_on_and_activity_brings_it_back(page: Any, server: MockServer) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    ask(page, "And what else?")
    roles = [message["role"] for message in server.sent("/v1/chat/completions")[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.goto(server.address + "#/activity")
    page.reload()
    page.locator("#history-list .title").click()
    page.wait_for_selector(THUMBNAILS_DRAWN)
    assert page.locator(".turn").count() == 2 and page.locator("#moments .pin").count() == 2
    ask(page, "And then?")
    assert len(server.sent("/v1/chat/completions")[2]["messages"]) == 5
    stored = page.evaluate("localStorage.getItem('keye.history')")
    assert "The red circle is visible at" in stored and len(stored) < 10_000, "text is kept, the video is not"
    page.get_by_role("link", name="Activity").click()
    page.get_by_role("button", name="Delete When").click()
    page.locator("#history-empty").wait_for()
    page.get_by_role("button", name="Undo").click()
    page.locator("#history-list .title").wait_for()


def test_a_reload_brings_back_file_question_and_answer(page: Any, server: MockServer) -> None:
    open_sample(page)
    find(page, "the red circle")
    address = page.url
    assert address.endswith("#/desk?file=file-0&mode=find&q=the+red+circle&t=3,8.5")
    page.reload()
    page.locator(".card").wait_for()
    page.locator("#time b", has_text="0:03.0").wait_for()
    assert position(page) == pytest.approx(3.0, abs=0.01) and page.locator("#file-states .note").count() == 0
    page.goto(server.address)
    page.reload()
    page.locator(".card").wait_for()
    assert page.inner_text("#file-name") == "sample.mp4", "the last file is opened where the address names none"
    assert len(server.sent("/v1/video/ground")) == 1, "nothing is asked again"


def test_a_link_puts_the_player_at_the_moment_and_does_not_ask(page: Any, server: MockServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_sample(page)
    turn = find(page, "the red circle")
    turn.get_by_role("button", name="Copy link").click()
    page.get_by_text("Link copied. It opens on this server.").first.wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    page.evaluate("localStorage.clear()")
    page.goto("about:blank")
    page.goto(link)
    page.locator("#time b", has_text="0:03.0").wait_for()
    assert page.input_value("#question") == "the red circle" and page.locator(".turn").count() == 0
    assert len(server.sent("/v1/video/ground")) == 1


def test_an_answer_can_be_deleted_and_brought_back(page: Any) -> None:
    open_sample(page)
    turn = find(page, "the red circle")
    choose(turn, "Delete this answer")
    assert page.locator(".turn").count() == 0 and page.locator("#moments .pin").count() == 0
    page.get_by_role("button", name="Undo").click()
    page.locator(".turn .card").wait_for()
    page.locator("#moments .pin").wait_for()


def test_find_marks_the_moments_of_an_event(page: Any, server: MockServer) -> None:
    open_sample(page)
    find(page, "the red circle")
    assert server.sent("/v1/video/ground") == [
        {"model": "keye-nano", "video": {"type": "video_url", "video_url": {"url": "file-0"}},
         "event": "the red circle", "stream": True, "evidence": True},
    ]  # fmt: skip
    assert page.locator("#moments .pin").count() == 1


def test_enter_sends_and_ctrl_enter_sends_in_the_other_mode(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "the red circle")
    page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True})
    assert page.locator(".turn").count() == 0, "an input method composes"
    page.press("#question", "Control+Enter")
    page.locator(".answer[aria-busy=false]").wait_for()
    assert len(server.sent("/v1/chat/completions")) == 1 and server.sent("/v1/video/ground") == []


def test_find_says_how_far_it_has_come(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "the slow red circle")
    page.keyboard.press("Enter")
    page.get_by_text("32 of 32").wait_for()
    assert page.get_by_role("progressbar", name="Opening the file").is_visible()
    assert page.inner_text("#running") == "1 running"
    server.release.set()
    page.locator("#moments .pin").wait_for()
    assert page.is_hidden("#running")


def test_the_timeline_shows_a_part_larger(page: Any) -> None:
    open_sample(page)
    ask(page, "When is the red circle visible?")
    assert page.is_hidden("#lane-whole"), "all of it is in view"
    page.locator("body").press("z")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("1")
    for _ in range(2):
        page.click("#zoom-in")
    page.locator("#lane-whole").wait_for()
    assert page.locator("#moments .pin").count() == 1 and page.locator("#whole-marks .pin").count() == 2
    assert page.inner_text("#zoom-switch") == "Whole"
    page.click("#zoom-switch")
    page.locator("#lane-whole").wait_for(state="hidden")
    assert page.locator("#moments .pin").count() == 2 and page.locator("#zoom-out").is_disabled()


def test_a_request_is_copied_as_a_command_line_without_the_key(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.evaluate("sessionStorage.setItem('keye.key', 'secret')")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.reload()
    open_sample(page)
    ask(page, "What's in it?")
    show_details(page)
    page.get_by_role("button", name="Copy as curl").click()
    page.get_by_text("Copied").first.wait_for()
    line = page.evaluate("navigator.clipboard.readText()")
    assert line.startswith(f"curl -N '{server.address}v1/chat/completions'")
    assert "Bearer $KEYE_API_KEY" in line and "secret" not in line and "What'\\''s in it?" in line


def test_settings_are_sent_and_kept(page: Any, server: MockServer) -> None:
    page.get_by_role("link", name="Settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Temperature").blur()
    page.get_by_label("Thinking").select_option("off")
    page.get_by_role("switch", name="Evidence of answers").click()
    page.get_by_role("radio", name="Dark").check()
    page.reload()
    page.get_by_role("link", name="Desk", exact=True).click()
    open_sample(page)
    ask(page, "When?")
    request = server.sent("/v1/chat/completions")[0]
    assert request["temperature"] == 0.5 and request["keye"] == {"evidence": False, "progress": True}
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_language_is_changed_in_place(page: Any) -> None:
    open_sample(page)
    find(page, "the purple cross")
    assert "Not found in this video. All 32 sampled frames were looked at." in page.inner_text(".turn .note")
    page.get_by_role("button", name="中文").click()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert "视频中未找到。 已查看全部 32 帧采样画面。" in page.inner_text(".turn .note")
    assert page.get_by_role("tab").first.inner_text().startswith("回答")
    assert page.inner_text("#model .chip") == "仅识别绘制图形", "what the server says has a translation"
    page.reload()
    page.get_by_role("button", name="English").wait_for()


def test_files_of_the_server_are_in_the_library_and_can_be_deleted(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.get_by_role("link", name="Library").first.click()
    page.locator("#library .title", has_text="sample.mp4").click()
    page.wait_for_selector("#timeline:not([hidden])")
    page.get_by_role("link", name="Settings").click()
    page.get_by_role("button", name="See and delete").click()
    page.get_by_role("button", name="Delete sample.mp4").click()
    page.get_by_text("0 files").wait_for()
    assert server.files == {}


def test_stop_ends_the_request_and_keeps_what_came(page: Any, server: MockServer) -> None:
    open_sample(page)
    page.fill("#question", "a slow one")
    page.press("#question", "Control+Enter")
    page.locator(".answer-text").get_by_text("The red circle").wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("Stopped.").wait_for()
    assert server.disconnected.wait(20), "the server sees that the client is gone"
    assert "The red circle" in page.inner_text(".answer-text")


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
    page.locator(".answer-text .time-link").first.wait_for()
    assert page.locator(".turn").count() == 1 and page.input_value("#question") == ""


def test_the_key_is_asked_for_once_and_kept_in_the_tab(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.click("#sample")
    page.fill("#key-input", "wrong")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("The server does not know this key.").wait_for()
    page.fill("#key-input", "secret")
    page.get_by_role("button", name="Go on").click()
    page.wait_for_selector("#plan-meter:not([hidden])", state="attached")
    turn = ask(page, "When?")
    assert turn.locator(".time-link").count() > 0
    assert page.evaluate("JSON.stringify(localStorage)").find("secret") == -1


def test_a_key_can_be_entered_later_in_the_settings(page: Any, server: MockServer) -> None:
    server.key = "secret"
    page.click("#sample")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Try again").wait_for()
    page.fill("#question", "When?")
    page.click("#send")
    assert "Enter the key under Settings." in page.inner_text("#notice")
    page.get_by_role("link", name="Settings").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enter a key").click()
    page.fill("#key-input", "secret")
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("link", name="Desk", exact=True).click()
    page.wait_for_selector("#plan-meter:not([hidden])", state="attached")
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
    page.wait_for_selector("#plan-meter:not([hidden])", state="attached")
    assert page.inner_text("#file-name") == "dropped.mp4"
    assert server.contents["file-0"] == SAMPLE.read_bytes()


@pytest.mark.parametrize(("question", "bars"), [("hostile", 2), ("hostile evil", 1)])
def test_hostile_answers_stay_text(page: Any, question: str, bars: int) -> None:
    open_sample(page)
    turn = ask(page, f"{question} <img src=x onerror=window.hacked=1>")
    displayed = turn.locator(".answer-text").inner_text()
    assert displayed == HOSTILE.replace("[[3.0, 8.5]]", "0:03.0 to 0:08.5")
    assert turn.locator("img, script, .answer-text svg, a, .answer-text b").count() == 0
    assert page.locator("#moments .pin").count() == bars, "what is not an interval is not drawn"


def test_hostile_file_names_stay_text(page: Any) -> None:
    name = "<img src=x onerror=window.hacked=1>'\";.mp4"
    video = {"name": name, "mimeType": "video/mp4", "buffer": SAMPLE.read_bytes()}
    page.set_input_files("#choose", [video])
    page.wait_for_selector("#plan-meter:not([hidden])", state="attached")
    assert page.inner_text("#file-name") == name
    assert page.locator(".file-bar img").count() == 0


def test_places_are_drawn_over_a_picture(page: Any, tmp_path: Path) -> None:
    page.screenshot(path=tmp_path / "picture.png")
    page.set_input_files("#choose", [tmp_path / "picture.png"])
    page.wait_for_selector("#file-states [role=progressbar]", state="detached")
    empty = page.evaluate("document.getElementById('regions').toDataURL()")
    turn = ask(page, "box of the dog")
    assert turn.locator(".answer-text").inner_text() == "A dog 1."
    assert page.evaluate("document.getElementById('regions').toDataURL()") != empty


def test_a_format_that_the_browser_cannot_play_is_still_asked_about(page: Any) -> None:
    video = {"name": "strange.mkv", "mimeType": "video/x-matroska", "buffer": b"no video"}
    page.set_input_files("#choose", [video])
    page.get_by_text("This browser cannot play this format. keye can: ask as usual").wait_for()
    page.wait_for_selector("#timeline:not([hidden])")
    assert ask(page, "When?").locator(".time-link").count() > 0
    assert page.locator("#moments .pin").count() == 2


def test_a_server_that_is_gone_loses_no_input(page: Any, server: MockServer) -> None:
    open_sample(page)
    server.close()
    turn = ask(page, "Are you there?")
    assert "No answer from the server. See whether keye serve is still running." in turn.inner_text()
    assert "Are you there?" in turn.inner_text() and turn.get_by_role("button", name="Try now").is_visible()
    turn.get_by_text("Trying again in").wait_for()


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_everything_without_scrolling_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    open_sample(page)
    ask(page, "When is the red circle visible?")
    assert page.evaluate("document.documentElement.scrollWidth") == width
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
