"""Places at which a text may be cut so that its parts, encoded one by one, give the tokens of the whole.

Knows the pre-tokenizers of the Keye-VL family and of keye-nano, and no others: their regular expressions are looked up,
not understood, and a text for an unknown one stays whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

#: Characters after which the next safe place is looked for.
PIECE: Final = 16_384

#: The pre-tokenizer of Qwen2 and Qwen3, from which the Keye-VL releases come.
_QWEN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: The pre-tokenizer of keye-nano begins so: no piece of it holds a letter and, after that, another character.
_NANO: Final = r"\.[0-9](?![0-9])|[0-9]{1,3}(?=(?:[0-9]{3}){0,6}(?![0-9]))|"

# Letters that no normalisation changes by what stands before them. A piece of _QWEN ends behind a digit, and where
# a letter is followed by one other character and a letter, and behind line breaks. No piece looks back.
_LETTER: Final = (
    "A-Za-z\u0400-\u0481\u048a-\u052f\u05d0-\u05ea\u0620-\u064a\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_MARK: Final = ' \\t!"#$%&()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b\u201c\u201d'
_CUTS: Final = {
    "qwen": re.compile(
        rf"(?<=[0-9])(?=[0-9{_LETTER}])|(?<=[{_LETTER}])(?=[{_MARK}][{_LETTER}])|(?<=\n)(?=[0-9{_LETTER}])"
    ),
    "nano": re.compile(r"(?<=[A-Za-z])(?=[^A-Za-z])"),
}


def cuts_of(pre_tokenizer: Any, normalizer: Any) -> re.Pattern[str] | None:
    """The empty matches at which texts may be cut for a pre-tokenizer of `tokenizers`, None where that is not known."""
    if pre_tokenizer is None:
        return None
    described = json.loads(pre_tokenizer.__getstate__())
    parts = described.get("pretokenizers", [described])
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if len(parts) != 2 or parts[0].get("type") != "Split" or bytewise.items() - parts[1].items():
        return None
    if parts[0].get("behavior") != "Isolated" or parts[0].get("invert"):
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__()).get("type") != "NFC":
        return None
    pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
    if pattern == _QWEN:
        return _CUTS["qwen"]
    return _CUTS["nano"] if normalizer is None and pattern.startswith(_NANO) else None


def pieces_of(text: str, cuts: re.Pattern[str] | None, size: int = PIECE) -> Iterator[str]:
    """The text in parts of about `size` characters, cut at safe places; a part without any is longer."""
    begin = 0
    while cuts is not None and (match := cuts.search(text, begin + size)) is not None:
        yield text[begin : match.start()]
        begin = match.start()
    yield text[begin:] if begin else text
