"""Yes or no, in English and Chinese, in what a reply says first or last.

Linear in the text's length.
"""

from __future__ import annotations

import re

from keye.scoring.strict.plain import simplify_han, to_plain
from keye.scoring.strict.reasoning import find_boxed, strip_reasoning

_YES = r"yes|yeah|yep|true|correct|right|certainly|indeed|是的?|对的?|正确|有的?|可以|能|属于|符合|含有"
_NO = r"no|nope|not|false|incorrect|wrong|否的?|不是的?|不对|错误?的?|不正确|没有|不可以|不能|不属于|不符合|不含|不"
_EDGE = r"(?:(?<=[\u4e00-\u9fff])|\b|(?=[^\w])|$)"
_LEADING = re.compile(rf"[\W_]*(?:(?P<no>{_NO})|(?P<yes>{_YES}))(?=[\W_]|$|[\u4e00-\u9fff])", re.IGNORECASE)
_CUE = re.compile(
    r"(?:answer|response|result|conclusion|judge?ment|verdict|答案|结论|回答|结果"
    r"|判断)[\"']?\s{0,3}(?:should be|is|would be|:|=|是|为|应为){1,2}[\W_]*"
    rf"(?:(?P<no>{_NO})|(?P<yes>{_YES}))(?=[\W_]|$|[\u4e00-\u9fff])",
    re.IGNORECASE,
)
_WORD = re.compile(r"\b(?:(?P<no>no|false)|(?P<yes>yes|true))\b", re.IGNORECASE)
_CHINESE = re.compile(r"(?P<neutral>是否|是不是|有没有)|(?P<no>不是|否)|(?P<yes>是)")


def find_yes_no(text: str) -> bool | None:
    """Whether a reply says yes (True) or no (False); None for neither, both or a refusal.

    What the reply opens with counts, then what follows "the answer is", then the only such word in it.
    """
    return read_yes_no(strip_reasoning(text).conclusion)


def read_yes_no(text: str) -> bool | None:
    """`find_yes_no` of a text that has no reasoning."""
    if (boxed := find_boxed(text)) is not None:
        text = boxed
    text = simplify_han(to_plain(text))
    cues = list(_CUE.finditer(text))
    if cues:
        answer = {match["yes"] is not None for match in cues}
        return answer.pop() if len(answer) == 1 else cues[-1]["yes"] is not None
    if match := _LEADING.match(text):
        rest = text[match.end() : match.end() + 16]
        if re.match(r"\s*(?:/|or\b|and\b|或)\W*(?:no|yes|否|是)", rest, re.IGNORECASE):
            return None
        return match["yes"] is not None
    answer = {match["yes"] is not None for match in _WORD.finditer(text)}
    if not answer:
        answer = {match["yes"] is not None for match in _CHINESE.finditer(text) if match["neutral"] is None}
    return answer.pop() if len(answer) == 1 else None
