"""What `keye find` says is in the language of the environment; both columns of its table are complete."""

from __future__ import annotations

import re
import string

import pytest

from keye.commands.shared import show_find
from keye.commands.shared.language import WORDS, find_language, in_english
from keye.moments import Coverage, FindResult, Moment, SeenSpan, SubtitleLine

MOMENTS = (
    Moment("m1", 1, 3.0, 4.5, 0.94, "twice", on_cut="start", subtitle=SubtitleLine(3.1, 4.0, "in this red folder")),
    Moment("m2", 2, 63.0, 64.0, 0.41, "no", on_cut="both"),
)
COVERAGE = Coverage(120.0, (SeenSpan(0.0, 100.0, 1.0),), ((100.0, 120.0),), 2, 130, 4000, 700)


def make_result(moments: tuple[Moment, ...] = MOMENTS) -> FindResult:
    return FindResult(
        "红色文件夹", "会议.mp4", "keye-nano", moments, MOMENTS[1:], 0.97, 0.5, COVERAGE, (), {"coarse": 2.0}
    )


def test_both_languages_have_every_sentence() -> None:
    for name, (english, chinese) in WORDS.items():
        assert english and chinese and re.search("[\u4e00-\u9fff]", chinese), name
        assert not re.search("[\u4e00-\u9fff]", english), name
        gaps = [{gap for _, gap, _, _ in string.Formatter().parse(text) if gap} for text in (english, chinese)]
        # Chinese has no plural: a count stands for "3 places".
        assert gaps[0] == gaps[1] or gaps[1] - gaps[0] == {"count"}, name


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_TW.UTF-8", "LC_MESSAGES": "en_GB"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_CN"}, "zh"),
    ],
)
def test_the_environment_decides(environment: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_language() == language


@pytest.mark.parametrize("language", ["zh_CN.UTF-8", "C"])
def test_results_are_in_one_language(
    language: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LC_ALL", language)
    show_find.print_found([make_result(), make_result(())], "红色文件夹", [("a.mp4", "error 7")])
    text = "".join(capsys.readouterr())
    chinese = ["已复核", "尚未复核", "始于镜头切换处", "未找到：红色文件夹（存在的可能性：97%）", "低于阈值",
               "已查看 83%，至少每 1 秒一帧", "仔细查看了 2 处", "130 帧", "未能查找 a.mp4：error 7"]  # fmt: skip
    english = [
        "confirmed",
        "start on a cut",
        "Not found: 红色文件夹 (probability that it is there: 97%)",
        "83% seen, a frame at least every 1 s",
        "2 places looked at closely",
        "a.mp4 was not searched: error 7",
    ]
    expected, others = (chinese, english) if language.startswith("zh") else (english, chinese)
    assert all(words in text for words in expected), text
    assert not any(words in text for words in others)
    assert in_english("left.minutes", minutes=6) == "6 min left"
