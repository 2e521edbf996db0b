"""The words of `keye find` in English and Chinese. The environment decides: LC_ALL, LC_MESSAGES, LANG.

Both columns are complete, and hold the same gaps; errors, options and what programs read stay English.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from keye.config.environment import preferred_language

Language = Literal["en", "zh"]
#: Sentences by name, English and Chinese.
WORDS: Final[dict[str, tuple[str, str]]] = {
    "stage.index": ("reading the video", "正在读取视频"),
    "stage.coarse": ("asking about all of it", "正在浏览全片"),
    "stage.close": ("looking closely", "正在仔细查看"),
    "stage.verify": ("checking", "正在复核"),
    "left.seconds": ("about {seconds} s left", "约剩 {seconds} 秒"),
    "left.minutes": ("{minutes} min left", "剩余 {minutes} 分钟"),
    "left.hours": ("{hours} h left", "剩余 {hours} 小时"),
    "checked.twice": ("confirmed", "已复核"),
    "checked.failed": ("a second question did not agree", "未通过复核"),
    "checked.no": ("not confirmed", "尚未复核"),
    "cut.start": ("start on a cut", "始于镜头切换处"),
    "cut.end": ("end on a cut", "止于镜头切换处"),
    "cut.both": ("on a cut", "起止于镜头切换处"),
    "span": ("{start} to {end}", "{start} 至 {end}"),
    "subtitle": ('"{text}" at {time}', "“{text}”，字幕时间 {time}"),
    "missing": ("Not found: {event}", "未找到：{event}"),
    "presence": (" (probability that it is there: {share})", "（存在的可能性：{share}）"),
    "weaker": ("below the threshold:", "低于阈值："),
    "failed": ("{file} was not searched: {error}", "未能查找 {file}：{error}"),
    "seen.nothing": ("nothing was looked at", "没有查看任何画面"),
    "seen.all": ("a frame at least every {spacing} s", "至少每 {spacing} 秒查看一帧"),
    "seen.part": ("{share} seen, a frame at least every {spacing} s", "已查看 {share}，至少每 {spacing} 秒一帧"),
    "places": ("{places} looked at closely", "仔细查看了 {count} 处"),
    "frames": ("{frames}", "{count} 帧"),
    "tokens": ("{index} tokens indexed, {query} for the question", "索引 {index} 个 token，本次提问 {query} 个"),
    "seconds": ("{seconds} s", "用时 {seconds} 秒"),
    "library.coarse": ("asking about all windows", "正在浏览所有视频"),
    "library.best": ("best so far: {file}, {span}", "目前最佳：{file}，{span}"),
    "library.partly": ("{file} was not searched whole: {reason}", "{file} 未能完整查找：{reason}"),
    "library.hours": ("in {searched} of {duration} hours", "已查找 {searched} / {duration} 小时"),
    "library.minutes": ("in {searched} of {duration} minutes", "已查找 {searched} / {duration} 分钟"),
    "library.windows": ("{share} of {windows} asked", "已浏览 {count} 段中的 {share}"),
    "library.videos": ("{videos} looked at closely", "仔细查看了 {count} 个视频"),
    "library.tokens": ("{query} tokens for the question", "本次提问 {query} 个 token"),
    "wrote": ("wrote {path}", "已写入 {path}"),
}


def find_language() -> Language:
    """The language of the environment, English where it is neither."""
    return "zh" if preferred_language().lower().startswith("zh") else "en"


def in_english(name: str, **values: Any) -> str:
    """A sentence in English, its gaps filled."""
    return WORDS[name][0].format(**values)


def say(name: str, **values: Any) -> str:
    """A sentence in the language of the environment, its gaps filled."""
    return WORDS[name][find_language() == "zh"].format(**values)
