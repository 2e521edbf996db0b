"""Times in a reply: clock times, numbers with units, bare numbers, each in seconds; what of them means something else.

Counts ("3 people"), numbers of frames and events, dates, lengths ("60 seconds long") and shares of confidence are left
out. Linear in the text's length: every repetition is bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_NUMBER = r"(?:\d{1,12}(?:\.\d{0,9})?(?:[eE][+-]?\d{1,2}(?![\d.]))?|\.\d{1,9})"
_HOUR = r"(?:hours?|hrs?|h|小时|時間|시간|horas?|heures?|stunden?)"
_MINUTE = r"(?:minutes?|mins?|min|m|分钟?|分|분|minutos?|minuten?|'(?=\s?\d{1,2}(?:\.\d{1,3})?\s?(?:\"|'')))"
_SECOND = r"(?:seconds?|secs?|sec|s|秒钟?|초|segundos?|secondes?|sekunden?|секунд\w?|сек|\"|'')"
_JOIN = r"[ \t]{0,2}(?:and|,)?[ \t]{0,2}"
_STOP = r"(?![A-Za-z\u00c0-\u024f])"
_TIME = re.compile(
    r"(?<![\d.])(?:"
    r"(?P<clock>(?:\d{1,3}:){1,3}\d{1,2}(?:[.,]\d{1,6}(?![\d:]))?)(?![\d:])"
    rf"|(?P<h>{_NUMBER})[ \t-]?{_HOUR}{_STOP}(?:{_JOIN}(?P<hm>{_NUMBER})["
    rf" \t-]?{_MINUTE}{_STOP})?(?:{_JOIN}(?P<hs>{_NUMBER})[ \t-]?{_SECOND}{_STOP})?"
    rf"|(?P<m>{_NUMBER})[ \t-]?{_MINUTE}{_STOP}"
    rf"(?:{_JOIN}(?P<ms>{_NUMBER})(?:[ \t-]?{_SECOND}{_STOP}|(?=\s{{0,2}}(?:to|until|till|and|-|~|到|至|[.;]|$))))?"
    rf"|(?P<milli>{_NUMBER})[ \t]?(?:ms|milliseconds?|毫秒){_STOP}"
    rf"|(?P<s>{_NUMBER})[ \t-]?{_SECOND}{_STOP}(?:{_JOIN}(?P<sm>\d{{1,3}})[ \t]?(?:ms|milliseconds?){_STOP})?"
    rf"|(?P<n>{_NUMBER})(?P<percent>[ \t]?%)?)",
    re.IGNORECASE,
)

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_NUMBER_WORDS = re.compile(
    rf"\b(?:{'|'.join(_WORD_VALUES)}|hundred)(?:(?:[ -]|[ ]and[ ])(?:{'|'.join(_WORD_VALUES)}|hundred)){{0,4}}\b",
    re.IGNORECASE,
)
_HAN_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"\u3007": 0, "两": 2}
_HAN = "零\u3007一二两三四五六七八九十百"
_HAN_UNIT = r"\s?(?:秒|分|小时)"
_HAN_NUMBER = re.compile(rf"[{_HAN}]{{1,7}}(?={_HAN_UNIT}|\s?[到至~-]\s?第?(?:[{_HAN}]{{1,7}}|\d{{1,6}}){_HAN_UNIT})")
_HAN_COUNT = re.compile(
    rf"(?<![\u4e00-\u9fff])[{_HAN}]{{1,7}}(?![\u4e00-\u9fff])"
    rf"|[{_HAN}]{{1,7}}(?=[\u4e2a\u53ea\u4eba\u540d\u4f4d\u6761\u5f20\u8f86\u672c\u6b21\u5757\u68f5\u6735])"
)

_COMMA_NUMBER = re.compile(r"(?<![\d.,:])\d{1,9}(?:,\d{1,3}){1,3}(?![\d,:])(?:\.\d{1,6})?")
_LINKS = r"-|~|\bto\b|\bthrough\b|\buntil\b|\btill\b|\bbis\b|\u00e0|\ba\b|\bhasta\b|до|\u0441|到|至|\band\b|>"
_LINK_AFTER = re.compile(rf"\s{{0,2}}(?:(?:s|secs?|seconds?|秒)\b)?\s{{0,2}}(?:{_LINKS})", re.IGNORECASE)
_LINK_BEFORE = re.compile(rf"(?:{_LINKS})\s{{0,2}}$", re.IGNORECASE)
_DOTS = re.compile(r"(?<=\d)[ \t]?\.{2,4}[ \t]?(?=\d)")
_AND_A_HALF = re.compile(r"(?<![\d.])(\d{1,4}) and a half\b", re.IGNORECASE)
_MINUTE_HALF = re.compile(r"(?<![\d.])(\d{1,4})分钟?半")
_ORDINAL = re.compile(r"(?<![\w.])(\d{1,5})(?:st|nd|rd|th)\b")
_NO_TIMES = re.compile(
    r"(?<!\d)\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?!\d)|(?<!\d)\d{1,2}[/.]\d{1,2}[/.]\d{4}(?!\d)"
    r"|(?<![\d./])\d{1,3}/\d{1,3}(?![\d./])(?! ?s\b)"
    r"|(?m:^[ \t>*-]{0,6}(?:\d{1,2}[.)]|\(\d{1,2}\))[ \t]{1,3}(?=[^\s\-~,;→>]))"
)
#: A unit before the number names it too: "second 12", "t=12.5".
_TIME_WORDS = frozenset(
    "from at between to until till and is in on about around approximately roughly approx second seconds"
    " sec secs s start starts starting started begin"
    " begins beginning began end ends ending ended finish finishes finishing stop stops stopping time"
    " times timestamp timestamps mark t by near after before through thru"
    " up or de von bis a la as happens occurs occurring spans lasts lasting covers ca circa it the of"
    " answer interval span range segment moment window"
    " desde hasta du au ab t1 t2 start_time end_time entre und y et e".split()
)
_LABEL_BEFORE = re.compile(r"([^\W\d_][\w]{0,24})[ \t]?[#.]?[ \t]?$")
_COUNT_AFTER = re.compile(r"[ \t-]{1,2}([A-Za-z\u00c0-\u024f]{2,20})\b|[ \t]?([\u4e00-\u9fff\uac00-\ud7af])")
_WORDS_AFTER = frozenset(
    (
        "to and until till through thru up as is in at where when while then for from with or bis hasta jusqu"
        " up into on the a by of before after the inclusive of seconds onwards rather instead not but because"
        " since which that this he she it they we his her their i so if although"
        " though nor during both within around approximately about roughly respectively only than say think"
        " believe guess estimate be was would see seen visible appears happen takes place runs ranges ranging"
    ).split()
)
#: Words before which, and behind which, a number can be a time.
_FUNCTION_WORDS = _TIME_WORDS | _WORDS_AFTER
_HAN_AFTER = "到至和秒分之的结开时、。处左在事为内부"
_LENGTH_BEFORE = re.compile(
    r"(?:\blast(?:s|ed|ing)?|\bfor|\bduration(?: of the \w{1,12})?(?: is| of)?|\blength(?: of the"
    r" \w{1,12})?(?: is| of)?|\btotal(?: of| length)?|\bwithin|\bevery|时长(?:为|是)?|持续(?:了)?"
    r"|总长(?:为)?|共)"
    r"[\"']?[ \t]{0,2}:?[ \t]{0,2}(?:about |around |approximately |roughly |only |约)?$",
    re.IGNORECASE,
)
_LENGTH_AFTER = re.compile(
    r"[ \t-]{0,2}(?:long\b|video|clip\b|film|footage|recording|movie|in (?:length|total|duration)|later"
    r"|earlier|apart|长|的视频|之后)",
    re.IGNORECASE,
)
_SHARE_BEFORE = re.compile(
    r"(?:confidence|probability|score|iou|certainty|likelihood|fps|year|置信度)[\"']?(?: level)?["
    r" \t]{0,2}(?:is|of|:|=)?[ \t]{0,2}$",
    re.IGNORECASE,
)


_CLOCK_BEFORE = re.compile(
    (r"\b(?:clock|watch|timer|wall)\b[^.\n\d]{0,20}\b(?:shows?|reads?|says?|displays?)\s{0,2}$"), re.IGNORECASE
)


@dataclass(frozen=True)
class Time:
    """A time that stands at `start` to `end` of a text. `is_clear` says that its form (unit, clock, decimals) makes it
    one; `scale` is 60 for bare minutes, `is_share` marks a percentage of the video."""

    start: int
    end: int
    seconds: float
    is_clear: bool
    is_bare: bool = False
    scale: float = 1.0
    is_share: bool = False


def spell_digits(text: str, duration: float | None) -> str:
    """The text with numbers in words as digits, decimal commas as points, thousands without commas, and without dates,
    fractions and marks of lists."""
    text = spell_han(spell_english_numbers(text))
    text = _AND_A_HALF.sub(r"\1.5", _MINUTE_HALF.sub(r"\1分30秒", text))
    text = _ORDINAL.sub(r"\1", _DOTS.sub(" - ", text))
    text = _NO_TIMES.sub(lambda match: " " if match[0].strip() else match[0], text)
    if "," in text:
        text = _COMMA_NUMBER.sub(lambda match: _resolve_comma(match, text, duration), text)
    return text


def spell_english_numbers(text: str) -> str:
    """The text with English numbers below 1,000 in words as digits."""
    return _NUMBER_WORDS.sub(lambda match: _spell_english(match[0]), text)


def spell_han(text: str, *, is_counted: bool = False) -> str:
    """The text with Chinese numerals before units of time as digits, with `is_counted` those of counts too."""
    if text.isascii():
        return text
    return (_HAN_COUNT if is_counted else _HAN_NUMBER).sub(lambda match: _spell_han(match[0]), text)


def _spell_english(words: str) -> str:
    total = current = 0
    values = [word for word in re.split(r"[ -]", words.lower()) if word != "and"]
    groups: list[int] = []
    for word in values:
        if word == "hundred":
            current = max(current, 1) * 100
            continue
        value = _WORD_VALUES[word]
        is_next = current and not (current % 100 == 0 or (current % 10 == 0 and current >= 20 and 0 < value < 10))
        if is_next:  # "five seven" are two numbers
            groups.append(current)
            current = 0
        current += value
    total = current
    return " ".join(map(str, [*groups, total]))


def _spell_han(numeral: str) -> str:
    total, digit = 0, None
    for character in numeral:
        if character in "十百":
            total += (1 if digit is None else digit) * (10 if character == "十" else 100)
            digit = None
        else:
            digit = (0 if digit is None else digit) * 10 + _HAN_DIGITS[character]
    return str(total + (digit or 0))


def _resolve_comma(match: re.Match[str], text: str, duration: float | None) -> str:
    """A number with commas as thousands, as a decimal, or as several numbers."""
    number = match[0]
    head, *groups = number.partition(".")[0].split(",")
    before, after = text[max(0, match.start() - 12) : match.start()], text[match.end() : match.end() + 16]
    apart = number.replace(",", ", ")
    if before[-1:] in tuple("[(<{") and after[:1] in tuple("])>}"):
        return apart
    is_linked = bool(_LINK_AFTER.match(after) or _LINK_BEFORE.search(before))
    if not is_linked:
        return apart if "." not in number or len(groups[0]) != 3 else number.replace(",", "")
    thousands = number.replace(",", "")
    if all(len(group) == 3 for group in groups) and len(head) <= 3 and head != "0":
        if duration is None or float(thousands) <= duration * 1.1 or "." in number or len(groups) > 1:
            return thousands
        return number.replace(",", ".")
    return number.replace(",", ".") if len(groups) == 1 and "." not in number else apart


def find_times(text: str, duration: float | None) -> list[Time]:
    """The times of a text in order, without numbers that say something else. `duration` turns shares into seconds."""
    times: list[Time] = []
    rejected_end = -1
    for match in _TIME.finditer(text):
        time = _read_time(match, duration)
        is_tied = rejected_end >= 0 and re.fullmatch(
            r"[ \t]{0,2}(?:-|~|to|and)[ \t]{0,2}(?:frames?[ \t])?", text[rejected_end : match.start()][:16]
        )
        if time is None or is_tied or not _is_time(text, match, time):
            rejected_end = match.end()
            continue
        rejected_end = -1
        times.append(time)
    times = _without_aliases(text, times)
    clear = [time for time in times if not time.is_share]
    return clear or times


def _read_time(match: re.Match[str], duration: float | None) -> Time | None:
    start, end = match.span()
    if clock := match["clock"]:
        fields = [float(field) for field in clock.replace(",", ".").split(":")]
        if len(fields) == 4:  # the last is a frame
            fields = fields[:3]
        seconds = 0.0
        for value in fields:
            seconds = seconds * 60 + value
        return Time(start, end, seconds, True)
    if match["h"] is not None:
        seconds = float(match["h"]) * 3600 + float(match["hm"] or 0) * 60 + float(match["hs"] or 0)
        return Time(start, end, seconds, True, scale=3600 if match["hm"] is None and match["hs"] is None else 1)
    if match["m"] is not None:
        return Time(
            start, end, float(match["m"]) * 60 + float(match["ms"] or 0), True, scale=60 if match["ms"] is None else 1
        )
    if match["milli"] is not None:
        return Time(start, end, float(match["milli"]) / 1000, True, scale=0.001)
    if match["s"] is not None:
        return Time(start, end, float(match["s"]) + float(match["sm"] or 0) / 1000, True)
    value = float(match["n"])
    if match["percent"]:
        return None if duration is None else Time(start, end, value / 100 * duration, False, is_share=True)
    return Time(start, end, value, not match["n"].rstrip(".").isdigit(), is_bare=True)


def _is_time(text: str, match: re.Match[str], time: Time) -> bool:
    before, after = text[max(0, match.start() - 32) : match.start()], text[match.end() : match.end() + 24]
    if _SHARE_BEFORE.search(before) or (not time.is_share and _LENGTH_BEFORE.search(before) and not time.is_bare):
        return False
    if match["clock"] and _CLOCK_BEFORE.search(before):
        return False
    if not time.is_bare:
        return not _LENGTH_AFTER.match(after)
    if _LENGTH_BEFORE.search(before):
        return False
    if time.is_clear:
        return True
    if (label := _LABEL_BEFORE.search(before)) and label[1].isascii() and label[1].lower() not in _FUNCTION_WORDS:
        return False
    if count := _COUNT_AFTER.match(after):
        return count[1].lower() in _WORDS_AFTER if count[1] else count[2] in _HAN_AFTER
    return True


def _without_aliases(text: str, times: list[Time]) -> list[Time]:
    """ "01:35 (95.6 s)" is one time, the more exact of both."""
    remaining: list[Time] = []
    for time in times:
        previous = remaining[-1] if remaining else None
        between = text[previous.end : time.start] if previous else ""
        if (
            previous
            and re.fullmatch(r"[ \t]{0,2}[(\[=][ \t]{0,2}(?:or |i\.e\. |about |~)?", between)
            and abs(time.seconds - previous.seconds) <= 1
        ):
            exact = time if time.seconds % 1 else previous
            close = time.end + 1 if text[time.end : time.end + 1] in tuple(")]") else time.end
            remaining[-1] = replace(exact, start=previous.start, end=close, is_clear=True, is_bare=False, scale=1.0)
        else:
            remaining.append(time)
    return remaining
