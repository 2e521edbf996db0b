"""Options that a reply ticks: check boxes in a list, marks behind letters. Linear in the text's length.

Names by place ("the second option") are not read: they say no letter.
"""

from __future__ import annotations

import re

_BOX = re.compile(
    r"^[ \t>*+-]{0,8}(?P<mark>\[[ xX✓✔]\]|[☐☑☒✅✔✓❌✗✘✖])[ \t]{0,3}[(*]{0,3}(?P<letter>[A-Z])(?![A-Za-z'])",
    re.MULTILINE,
)
_MARKED = re.compile(
    r"(?<![A-Za-z'])(?P<letter>[A-Z])[)*]{0,3}[ \t]{0,3}[.:|-]?[ \t]{0,3}(?P<mark>\[[ xX✓✔]\]|[☐☑☒✅✔✓❌✗✘✖])"
)
_TICKS = frozenset(("[x]", "[X]", "[✓]", "[✔]", "☑", "✅", "✔", "✓"))


def find_marked(text: str, letters: str) -> str | None:
    """The only letter that has a tick, of at least two letters with marks; None where marks decide nothing."""
    for pattern in (_BOX, _MARKED):
        marks = {match["letter"]: match["mark"] in _TICKS for match in pattern.finditer(text)}
        ticked = [letter for letter, is_ticked in marks.items() if is_ticked]
        if len(marks) > 1 and len(ticked) == 1 and set(marks) <= set(letters):
            return ticked[0]
    return None
