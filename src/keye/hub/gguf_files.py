"""Which files of a hub repository a GGUF model is: `organisation/name:Q4_K_M`, or `:FILE.gguf`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from keye.errors import KeyeError

#: Vision parts in the order in which they are preferred.
_PRECISIONS: Final = ("F16", "BF16", "Q8_0")
_PART: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


def choose_files(names: Collection[str], choice: str, where: str) -> list[str]:
    """The files of the model that `choice` names, by file name or by the type in it, the first one first, and of its
    vision part if there is one. `KeyeError` that lists what there is where no or several models fit."""
    models = sorted(name for name in names if name.lower().endswith(".gguf") and not _is_vision(name))
    fitting = [name for name in models if choice.lower() in (name.lower(), _PART.sub("", name).lower())]
    fitting = fitting or [name for name in models if _has_word(name, choice)]
    if len({_PART.sub("", name) for name in fitting}) != 1:
        listed = ", ".join(dict.fromkeys(_PART.sub("", name) for name in models)) or "no GGUF files"
        raise KeyeError(f"{where} holds {listed}: name one of them, as in {where.partition(':')[0]}:Q4_K_M.")
    parts = sorted((name for name in names if _is_vision(name)), key=_rank)
    return fitting + parts[:1]


def _is_vision(name: str) -> bool:
    return name.lower().endswith(".gguf") and "mmproj" in name.lower()


def _has_word(name: str, word: str) -> bool:
    """Whether a type is a word of a file's name: F16 is none of BF16."""
    return re.search(rf"(?:^|[-._]){re.escape(word)}(?:[-._]|$)", name, re.IGNORECASE) is not None


def _rank(name: str) -> tuple[int, str]:
    return next((i for i, kind in enumerate(_PRECISIONS) if _has_word(name, kind)), len(_PRECISIONS)), name
