"""Yes or no, in English and Chinese, in what a reply says first or last.

Linear in the text's length.
"""

from __future__ import annotations

import re

from keye.scoring.strict.plain import simplify_han, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning

_YES = (
    r"yes|yeah|yep|true|(?:certainly|absolutely|of course|definitely)(?! not)|indeed|affirmative"
    r"|sure(?=\s*(?:[.,!;]|$))|(?:correct|right)(?=\s*(?:[.,!;:)\"*]|$))|是(?!否|不是)的?|对的?|正确|有的?"
    r"|可以|能|属于|符合|含有"
)
_NO = (
    r"no(?!-| (?:one|answer|information|idea|video|image|clear|way|data|response)\b)"
    r"|nope|negative|(?:definitely|absolutely|certainly|of course) not"
    r"|not(?! (?:sure|certain|clear|enough|applicable|visible|available|determin\w*)\b)|false"
    r"|(?:incorrect|wrong)(?=\s*(?:[.,!;:)\"*]|$))|否的?|错误?的?|没有|没|不(?!确定|知道|清楚|明|详|好说"
    r"|太|一定)(?:是的?|对|正确|可以|能|属于|符合|含有?)?"
)
_ENDS = r"(?=[\W_]|$|[\u4e00-\u9fff])"
_LEADING = re.compile(rf"[\W_]*(?:(?P<no>{_NO})|(?P<yes>{_YES})){_ENDS}", re.IGNORECASE)
_CUE = re.compile(
    r"(?:answer|response|result|conclusion|judge?ment|verdict|答案|结论|回答|结果|判断(?!是否))[\"']?\s{0,3}"
    rf"(?:should be|is|would be|:|=|应?(?:是|为)){{1,2}}[\W_]*(?:(?P<no>{_NO})|(?P<yes>{_YES})){_ENDS}",
    re.IGNORECASE,
)
#: A heading that names both words and answers nothing: "Yes/No:".
_HEADING = re.compile(r"[\W_]*(?:yes ?/ ?no|是 ?/ ?否) ?[:?][\W_]*", re.IGNORECASE)
#: What takes an answer back: "no. Actually, yes".
_CORRECTED = re.compile(
    r"\b(?:wait|actually|correction|on second thought)\b[\s,:.-]{1,4}(?:it is |it's |the answer is )?"
    r"(?:(?P<no>no|false)|(?P<yes>yes|true))(?=\s*(?:[.,!;\"*]|$))",
    re.IGNORECASE,
)
#: The other word right behind the first: "Yes/No", "是, 否", "No. Yes."
_OTHER = re.compile(
    r"[\s/,.;、|。，]*(?:or|and|或者?|和)?\W*(?:(?P<no>no|false|否|不是)|(?P<yes>yes|true"
    r"|是))(?=\s*(?:[.,!;。，)\"*/]|$|it\b))",
    re.IGNORECASE,
)
_WORD = re.compile(
    (r"\b(?:(?P<no>no(?!-| (?:one|answer|idea|way|information)\b)|false)|(?P<yes>yes|true))\b"), re.IGNORECASE
)
_CHINESE = re.compile(r"(?P<neutral>是否|是不是|有没有|不确定|但是|还是|可是|于是)|(?P<no>不是|否)|(?P<yes>是)")
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|unable|unknown|unclear|not sure|not certain|don't know|impossible to)\b|无法"
    r"|不确定|不知道|不清楚",
    re.IGNORECASE,
)
_PARTS = re.compile(r"[.!?;,\n\u3002\uff01\uff1f\uff1b\uff0c]+|\s+(?=[是否]$)")


def find_yes_no(text: str) -> bool | None:
    """Whether a reply says yes (True) or no (False); None for neither, both or a refusal.

    What follows the last "the answer is" counts, then what the reply opens with, then the only such word in it. A reply
    that consists of reasoning alone is read from its last words.
    """
    stripped = strip_reasoning(text)
    if stripped.answer or not stripped.reasoning:
        return read_yes_no(stripped.answer)
    parts = [part for part in _PARTS.split(stripped.reasoning[-2_000:]) if part.strip()]
    return read_yes_no(parts[-1]) if parts else None


def read_yes_no(text: str) -> bool | None:
    """`find_yes_no` of a text that has no reasoning."""
    if (boxed := find_boxed(text)) is not None:
        text = boxed
    text = simplify_han(to_plain(text))
    if heading := _HEADING.match(text):
        text = text[heading.end() :]
    cues = (*_CUE.finditer(text), *_CORRECTED.finditer(text))
    cue = max(cues, key=lambda match: match.start(), default=None)
    first = cue or _LEADING.match(text)
    if first is not None:
        is_yes = first["yes"] is not None
        other = _OTHER.match(text, first.end())
        return is_yes if other is None or (other["yes"] is not None) == is_yes else None
    if _REFUSAL.search(text):
        return None
    answers = {match["yes"] is not None for match in _WORD.finditer(text)}
    if not answers:
        answers = {match["yes"] is not None for match in _CHINESE.finditer(text) if match["neutral"] is None}
    return answers.pop() if len(answers) == 1 else None
