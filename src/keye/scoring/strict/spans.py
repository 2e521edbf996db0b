"""The span of time that a reply names, in seconds.

Times are read by `times`; two of them are a span where the words between them link them ("12.5 to 18", "[12.5, 18]",
"starts at ... ends at ..."). Spans that a reply denies or corrects do not count, those behind "final answer" count
before others. Linear in the text's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from keye.scoring.strict.plain import shorten, simplify_han, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning
from keye.scoring.strict.times import Time, find_times, spell_digits

Span = tuple[float, float]

_FILL = (
    r"(?:[\s\"'()\[\]{}<>*_|:=.#]|\bthe\b|\babout\b|\baround\b|\bapprox(?:imately|\.)?|\broughly\b|\bat\b"
    r"|\bseconds?\b|\bsecs?\b|\bs\b|\bmark\b|\btime\b|\bt\d?\b|\bframes?\b|第|大约|约|秒|钟|\bmins?\b)"
)
_STRONG = (
    r"(?:-{1,3}|=>|~|\bto\b|\buntil\b|\btill\b|\bthrough\b|\bthru\b|\bup to\b|\bbis\b|\u00e0|\bhasta\b"
    r"|\bjusqu'\u00e0\b|до|по|\ba\b|\bal\b|\bau\b|到|至|から|부터|\.{2,4})"
)
_SOFT = r"(?:,|;|/|\band\b|&|和|\u3001|\by\b|\bund\b|\bet\b|)"
_START = r"(?:start(?:s|ing|ed|_time)?|begin(?:s|ning)?|began|from|onset|开始|起始|从)"
_END = (
    r"(?:end(?:s|ing|ed|_time)?|finish(?:es|ing|ed)?|stop(?:s|ping|ped)?|until|till|conclud(?:es|ing)"
    r"|last(?:s|ing)? (?:until|to|till)|over by|结束|终止|到|至)"
)
_STRONG_LINK = re.compile(rf"{_FILL}{{0,12}}{_STRONG}{_FILL}{{0,12}}>?{_FILL}{{0,6}}", re.IGNORECASE)
_SOFT_LINK = re.compile(rf"{_FILL}{{0,12}}{_SOFT}{_FILL}{{0,12}}", re.IGNORECASE)
_LIST_BREAK = re.compile(r"[\])}]\s*,?\s*[\[({]|[;\n].*[\[(]")
_END_WORD = re.compile(rf"\b{_END}\b|[结终到至]", re.IGNORECASE)
_START_WORD = re.compile(rf"\b{_START}\b|[开起从]", re.IGNORECASE)
_BETWEEN_BEFORE = re.compile(r"\bbetween\b[^.\n]{0,24}$|在[^\u3002\n]{0,12}$", re.IGNORECASE)
_FINAL = re.compile(
    r"\b(?:final answer|answer|conclusion|therefore|thus|hence|in summary)\b(?: is)?\W{0,4}|答案|最终|因此",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|no,|correction|on second thought|rather|but|instead|let me correct|more"
    r" precisely)\b|更正|不对|而是",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    (
        r"(?:\bnot(?! (?:sure|certain|entirely|exactly|only|clear))|\bisn't|\bnever|\brather than|\binstead of"
        r"|不是|并非)\W{0,3}(?:\w{1,12}\W{1,3}){0,3}$"
    ),
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s\])}s.]{0,4}(?:seconds?\s)?(?:is|are|was|would be|seems|是)?\s?(?:wrong|incorrect|not|too"
    r" (?:early|late)|false|错|不对)\b",
    re.IGNORECASE,
)
_TENTATIVE_BEFORE = re.compile(
    r"\b(?:maybe|perhaps|first guess|first thought|at first|thought|might be|could be|initial(?:ly)?"
    r"|preliminary|rough(?: estimate)?|guess|frames?|score)\b[^.;\n]{0,24}$",
    re.IGNORECASE,
)
_TO_END = re.compile(
    r"[\s\])}s]{0,4}(?:seconds?\s)?(?:-|~|to|until|till|through|到|至|直到)\s?(?:the\s)?(?:very\s)?(?:end"
    r"|结束|结尾|最后|末尾)",
    re.IGNORECASE,
)
_FROM_START = re.compile(
    r"(?:(?:the\s)?(?:very\s)?(?:start|beginning|opening)|开头|开始|视频开始)[^.\d\n]{0,24}(?:-|~|to|until"
    r"|till|through|到|至)\W{0,3}(?:about |around |第)?$",
    re.IGNORECASE,
)
_ALL = re.compile(
    r"\b(?:whole|entire|full) (?:video|clip|duration)\b|\bthroughout the (?:whole |entire )?(?:video|clip)"
    r"|\b(?:beginning|start) to (?:the )?end\b|整个视频|全程",
    re.IGNORECASE,
)
_NEVER = re.compile(
    r"\b(?:does not|doesn't|did not|didn't|never) (?:happen|occur|appear|take place|exist)|\bno such"
    r" event\b|\bcannot (?:tell|determine|find|see)\b|未出现|没有(?:出现|发生)",
    re.IGNORECASE,
)


_ATTRIBUTES = re.compile(r"<\w{1,20}\s([^<>]{0,200}=[^<>]{0,200})>")


@dataclass(frozen=True)
class _Candidate:
    """A span in a text. `rank` says how clearly the text links its times."""

    span: Span
    start: int
    end: int
    rank: int


def find_span(text: str, *, duration: float | None = None) -> Span | None:
    """The span that a reply names, (start, end) in seconds with start <= end; None where it names none.

    Of several spans it is the first that the reply does not take back. A single moment is a span without length.
    `duration` of the video in seconds gives "to the end" and shares ("10 %") a meaning.
    """
    spans = find_spans(text, duration=duration)
    return spans[0] if spans else None


def find_spans(text: str, *, duration: float | None = None) -> list[Span]:
    """All spans that a reply names, in the order of the text; those it thinks of, denies or corrects are left out.

    A reply that consists of reasoning alone is read for its last span.
    """
    stripped = strip_reasoning(text)
    if stripped.answer:
        return _read_spans(stripped.answer, duration)
    return _read_spans(stripped.reasoning, duration)[-1:] if stripped.reasoning else []


def _read_spans(text: str, duration: float | None) -> list[Span]:
    text = shorten(text)
    boxed = find_boxed(text)
    if boxed is not None and any(character.isdecimal() for character in boxed):
        text = boxed
    if "=" in text:
        text = _ATTRIBUTES.sub(r" \1 ", text)
    text = spell_digits(simplify_han(to_plain(text)), duration)
    times = find_times(text, duration)
    if not times:
        return [(0.0, duration)] if duration is not None and _ALL.search(text) and not _NEVER.search(text) else []
    candidates = _pair(text, times)
    if candidates:
        return [candidate.span for candidate in _choose(text, candidates)]
    span = _read_labels(text, times, duration)
    return [span] if span is not None else []


def _pair(text: str, times: list[Time]) -> list[_Candidate]:
    """Spans of neighbouring times that are linked; a time belongs to one span alone."""
    candidates: list[_Candidate] = []
    index = 0
    while index + 1 < len(times):
        first, second = times[index], times[index + 1]
        rank = _rank(text, first, second, times[index - 1].end if index else 0)
        following = times[index + 2] if index + 2 < len(times) else None
        if rank == 1 and following is not None and _rank(text, second, following, first.end) > 1:
            rank = 0
        if rank:
            candidates.append(_Candidate(_span(first, second), first.start, second.end, rank))
        index += 2 if rank else 1
    return candidates


def _rank(text: str, first: Time, second: Time, previous_end: int) -> int:
    """How clearly two times are a span: 3 linked and clearly times, 2 linked, 1 side by side, 0 not at all. Words
    before `previous_end` belong to another time."""
    between = text[first.end : second.start]
    if len(between) > 80:
        return 0
    is_clear = first.is_clear or second.is_clear
    if _STRONG_LINK.fullmatch(between):
        return 3 if is_clear else 2
    if _END_WORD.search(between) and _START_WORD.search(text[max(previous_end, first.start - 40) : first.start]):
        return 3
    if _LIST_BREAK.search(between) or not _SOFT_LINK.fullmatch(between):
        return 0
    is_enclosed = text[max(0, first.start - 2) : first.start].strip()[-1:] in tuple("[({<") and text[
        second.end : second.end + 2
    ].strip()[:1] in tuple("])}>s")
    if is_enclosed or _BETWEEN_BEFORE.search(text[max(0, first.start - 32) : first.start]):
        return 3 if is_clear or is_enclosed else 2
    return 2 if first.is_clear and second.is_clear else 1


def _span(first: Time, second: Time) -> Span:
    start = first.seconds * (second.scale if first.is_bare else 1)
    return (min(start, second.seconds), max(start, second.seconds))


def _choose(text: str, candidates: list[_Candidate]) -> list[_Candidate]:
    """The spans that count: not denied, behind the last "answer" or correction, as clearly linked as the best."""
    standing = [candidate for candidate in candidates if not _is_denied(text, candidate)]
    if not standing:
        return []
    firm = [
        candidate
        for candidate in standing
        if not _TENTATIVE_BEFORE.search(text[max(0, candidate.start - 48) : candidate.start])
    ]
    standing = firm or standing
    for mark in (_FINAL, _CORRECTION):
        position = max((match.end() for match in mark.finditer(text) if match.end() <= standing[-1].start), default=0)
        behind = [candidate for candidate in standing if candidate.start >= position]
        if max(candidate.rank for candidate in behind) >= max(candidate.rank for candidate in standing) - 1:
            standing = behind
    best = max(candidate.rank for candidate in standing)
    return [candidate for candidate in standing if candidate.rank == best]


def _is_denied(text: str, candidate: _Candidate) -> bool:
    before, after = text[max(0, candidate.start - 40) : candidate.start], text[candidate.end : candidate.end + 32]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after))


def _read_labels(text: str, times: list[Time], duration: float | None) -> Span | None:
    """A span of times that no words link: its first and last time, or one time and an end of the video."""
    clear = [time for time in times if time.is_clear] or times
    first, last = clear[0], clear[-1]
    if len(clear) == 1:
        if _TO_END.match(text[first.end : first.end + 40]):
            return None if duration is None else (first.seconds, max(duration, first.seconds))
        if _FROM_START.search(text[max(0, first.start - 48) : first.start]):
            return (0.0, first.seconds)
        if _NEVER.search(text):
            return None
        is_all = not text[: first.start].strip(" \n\t[(<{\"'") and not text[first.end :].strip(" \n\t])>}\"'.s")
        return (first.seconds, first.seconds) if first.is_clear or is_all else None
    if len(clear) == 2 and clear[0].is_clear:
        return _span(first, last)
    starts = [time for time in clear if _START_WORD.search(text[max(0, time.start - 24) : time.end + 24])]
    ends = [time for time in clear if _END_WORD.search(text[max(0, time.start - 24) : time.end + 24])]
    return _span(starts[0], ends[-1]) if starts and ends and starts[0].start < ends[-1].start else None
