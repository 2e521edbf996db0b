"""What the page says while something is under way or wrong, and that everybody can read and operate it."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.mock_server import BROKEN, NOTE, SAMPLE, MockServer
from tests.support.page import THUMBNAILS_DRAWN, ask, choose, open_sample, position

pytestmark = pytest.mark.slow

#: Relative luminance of the colours of WCAG 2, and the ratio of two of them.
CONTRAST = """
    const light = (color) => {
        const scale = color.startsWith("color(") ? 1 : 255;
        const parts = color.match(/[0-9.]+/g).slice(0, 3).map((n) => n / scale);
        const [r, g, b] = parts.map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
    const clear = (color) => color === "transparent" || /, 0\\)$/.test(color);
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (!clear(color)) return color;
        }
        return "rgb(255, 255, 255)";
    };
"""


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
    page.click("#advanced summary")
    page.fill("#start", start)
    page.fill("#end", end)
    page.click("#advanced summary")  # closed, so that the field cannot be seen
    page.fill("#question", "What happens?")
    assert page.get_attribute("#send", "aria-disabled") == "true"
    page.click("#send", force=True)
    assert page.evaluate("document.activeElement.id") == field
    assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    assert sentence in page.inner_text("#sampling-problem") and page.is_visible("#sampling-problem")
    assert server.sent("/v1/chat/completions") == [] and page.input_value("#question") == "What happens?"
    page.fill(f"#{field}", "")
    assert page.get_attribute("#send", "aria-disabled") == "false"
    page.click("#send")
    page.locator(".answer[aria-busy=false] .mark").first.wait_for()


def test_a_broken_file_shows_the_sentence_of_the_server(page: Any) -> None:
    page.set_input_files("#choose", [video("broken.mp4")])
    page.locator("#tray .wrong").wait_for()
    assert BROKEN in page.inner_text("#tray")
    page.fill("#question", "What happens?")
    page.click("#send")
    assert BROKEN in page.inner_text("#notice") and page.input_value("#question") == "What happens?"


def test_a_question_waits_for_the_upload(page: Any, server: MockServer) -> None:
    server.checking = threading.Event()
    page.set_input_files("#choose", [video("clip.mp4")])
    page.locator("#tray").get_by_text("checking").wait_for()
    page.fill("#question", "When is the red circle visible?")
    page.press("#question", "Enter")
    page.get_by_text("Your question is asked as soon as the file is ready.").wait_for()
    page.get_by_role("button", name="Take it back").click()
    assert page.input_value("#question") == "When is the red circle visible?" and page.locator(".turn").count() == 0
    page.press("#question", "Enter")
    server.checking.set()
    page.locator(".answer[aria-busy=false] .mark").first.wait_for()
    assert page.locator(".turn").count() == 1 and len(server.sent("/v1/chat/completions")) == 1


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
    first, second = turn.locator(".moment-row").all()
    assert first.locator(".main").inner_text() == "0:03.0 to 0:08.5" and "5.5 s" in first.inner_text()
    assert second.locator(".mark").inner_text() == "0:12.0 to 0:15.5"
    second.get_by_role("button", name="Play the moment").click()
    page.locator("#play", has_text="Pause").wait_for()
    page.locator("#play", has_text="Play").wait_for()
    assert position(page) == pytest.approx(15.5, abs=0.45), "it stops at the end of the moment"
    with page.expect_download():
        first.get_by_role("button", name="Save the clip").click()
    assert server.sent("/v1/clips") == [{"file_id": "file-0", "intervals": [[3.0, 8.5]]}]
    choose(turn, "Use as range")
    assert page.inner_text("#range-text") == "Asks about 0:03.0 to 0:08.5"


def test_find_shows_the_moment_and_not_the_list(page: Any) -> None:
    open_sample(page)
    page.get_by_text("Find", exact=True).click()
    turn = ask(page, "the red circle")
    assert turn.locator(".moment-row").count() == 1
    assert "[[" not in turn.inner_text() and turn.locator(".answer-text").is_hidden()


def test_the_menu_is_operated_with_keys(page: Any) -> None:
    open_sample(page)
    turn = ask(page, "When?")
    opener = turn.get_by_role("button", name="More for this answer")
    opener.focus()
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.textContent"
    assert page.evaluate(focused) == "Copy times" and opener.get_attribute("aria-expanded") == "true"
    page.keyboard.press("End")
    assert page.evaluate(focused) == "Show on timeline"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "Copy times"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "More" and turn.get_by_role("menu").is_hidden()


def test_notes_on_file_and_answer_are_shown(page: Any) -> None:
    open_sample(page)
    assert page.inner_text("#plan-notes") == "the file has 2 video tracks; the second is read"
    assert NOTE in ask(page, "something far away").locator(".notes").inner_text()


def test_the_empty_page_offers_questions_about_the_sample(page: Any) -> None:
    page.get_by_role("button", name="When is the red circle visible?").click()
    page.locator(".answer[aria-busy=false] .mark").first.wait_for()
    assert page.inner_text(".question") == "When is the red circle visible?"


def test_answers_are_read_aloud_when_they_are_complete(page: Any, server: MockServer) -> None:
    open_sample(page)
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    page.fill("#question", "a slow one")
    page.press("#question", "Enter")
    page.locator(".answer-text").get_by_text("The red circle").wait_for()
    assert log.locator(".answer").get_attribute("aria-busy") == "true"
    server.release.set()
    log.locator(".answer[aria-busy=false]").wait_for()


def test_pictures_of_the_timeline_are_whole_and_labels_do_not_overlap(page: Any) -> None:
    open_sample(page)
    page.wait_for_selector(THUMBNAILS_DRAWN)
    shapes = page.locator("#thumbs canvas").evaluate_all("(all) => all.map((one) => one.width / one.height)")
    assert all(shape == pytest.approx(1.0, abs=0.05) for shape in shapes), "the sample is square"
    for width in (1280, 700, 390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(100)
        boxes = page.locator("#axis span").evaluate_all(
            "(all) => all.map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])"
        )
        edge = page.locator("#axis").bounding_box()
        assert len(boxes) >= 2
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(boxes))
        assert boxes[-1][1] <= edge["x"] + edge["width"] + 0.5


def test_a_phone_on_its_side_shows_video_and_answer_together(page: Any) -> None:
    page.set_viewport_size({"width": 844, "height": 390})
    open_sample(page)
    card = ask(page, "When is the red circle visible?").locator(".card").bounding_box()
    video_box = page.locator("#video").bounding_box()
    assert video_box["y"] >= 0 and video_box["y"] + video_box["height"] <= 390
    assert card["x"] > video_box["x"] + video_box["width"] and card["y"] + card["height"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 844


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_controls_stand_out_from_their_ground(page: Any, theme: str) -> None:
    page.evaluate("(theme) => document.documentElement.dataset.theme = theme", theme)
    open_sample(page)
    ask(page, "When is the red circle visible?")
    page.click("#advanced summary")
    faults = page.evaluate(
        """() => {"""
        + CONTRAST
        + """
            const shown = (node) => node.checkVisibility() && !node.disabled && node.getClientRects().length
                && !node.closest(".visually-hidden, .skip");
            const found = [];
            for (const node of document.querySelectorAll("input, select, textarea, button, .button, .modes")) {
                if (!shown(node) || node.closest(".modes") && node.tagName === "INPUT") continue;
                const style = getComputedStyle(node);
                const edge = style.borderTopColor, own = style.backgroundColor, around = ground(node.parentElement);
                const bordered = !clear(edge) && parseFloat(style.borderTopWidth) > 0;
                const seen = Math.max(bordered ? ratio(edge, around) : 0, clear(own) ? 0 : ratio(own, around));
                const words = node.textContent.trim() || node.placeholder;
                const field = /^(INPUT|SELECT|TEXTAREA)$/.test(node.tagName);
                if ((field || !words) && node.type !== "checkbox" && seen < 3)
                    found.push(`${node.outerHTML}: edge ${seen}`);
                if (words && node.tagName !== "METER" && ratio(style.color, ground(node)) < 4.5)
                    found.push(`${node.id || words}: text ${ratio(style.color, ground(node))}`);
            }
            return found;
        }"""
    )
    assert faults == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, theme: str) -> None:
    """The rules of axe-core on the empty page, on one with an answer, with its menu open and on each dialog."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs the extra: pip install keye[dev]")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    page.evaluate("(theme) => document.documentElement.dataset.theme = theme", theme)

    def check(state: str) -> None:
        page.evaluate(script)
        result = page.evaluate(
            "async () => (await axe.run()).violations.map((one) => `${one.id}: ${one.nodes.map((n) => n.html)}`)"
        )
        assert result == [], state

    check("empty")
    open_sample(page)
    turn = ask(page, "something far away")
    check("answer")
    turn.get_by_role("button", name="More for this answer").click()
    check("menu")
    page.keyboard.press("Escape")
    page.click("#advanced summary")
    page.fill("#start", "noon")
    check("a wrong range")
    page.fill("#start", "")
    for opener, dialog in (("#open-settings", "#settings"), ("#open-history", "#history"), ("#open-keys", "#keys")):
        page.click(opener)
        check(dialog)
        page.locator(dialog).get_by_role("button", name="Done").click()


def test_forced_colours_keep_marks_and_choices_visible(page: Any) -> None:
    page.emulate_media(forced_colors="active")
    open_sample(page)
    ask(page, "When is the red circle visible?")
    colors = page.evaluate(
        """() => {
            const style = (query) => getComputedStyle(document.querySelector(query));
            return [style(".bar").backgroundColor, style(".lanes").backgroundColor,
                style(".modes input:checked + span").borderTopWidth, style(".lanes").borderTopWidth];
        }"""
    )
    assert colors[0] != colors[1] and colors[2:] == ["3px", "1px"]
