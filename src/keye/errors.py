"""Errors that are the user's to fix, warnings of settings that could not be honoured, and the checks that lead to them.

Every other exception is a bug of ours and shows its traceback. A sentence may name options; they are spelled as in
Python unless the CLI or HTTP layer spells them its own way.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """An option that a sentence names, with a value if it is to be set to one."""

    name: str
    value: object = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


#: Characters of a value that a sentence shows.
_MAX_SHOWN = 80


def brief(value: object) -> str:
    """A value as a sentence shows it: its beginning where it is long, in time that does not grow with it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    if isinstance(value, str | bytes) and len(value) > _MAX_SHOWN:
        return f"{value[:_MAX_SHOWN]!r}..."
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} entries"
    displayed = repr(value)
    return displayed if len(displayed) <= _MAX_SHOWN else f"{displayed[:_MAX_SHOWN]}..."


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float, and no bool; whole numbers that no float holds are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


class _Worded(Exception):
    """A sentence with `{}` for each of `parts`, texts or options; without parts it stands as it is."""

    def __str__(self) -> str:
        return self.worded(str)

    def worded(self, spell: Callable[[Option], str]) -> str:
        """The sentence with its options spelled by `spell`."""
        sentence, *parts = self.args
        if not parts:
            return str(sentence)
        return str(sentence).format(*(spell(part) if isinstance(part, Option) else part for part in parts))


class KeyeError(_Worded, ValueError):
    """A mistake in what the user gave: a file, a name, a setting.

    The message is one sentence that names the thing and says what to do. The command line prints it without a
    traceback and exits with code 2; libraries may catch it as `ValueError`.
    """


def missing_package(package: str | None, what: str, extra: str) -> KeyeError:
    """The error where `what` needs a package that the extra brings: it says how both kinds of installation get it."""
    return KeyeError(
        f"{package or 'a package'} is not installed, which {what} needs; pip install 'keye[{extra}]', or in a clone "
        f"pip install -e '.[{extra}]', brings it"
    )


class MediaError(KeyeError):
    """An image or video that cannot be used: missing, damaged, cut short, too large, or of a kind we do not read."""


class ContextError(KeyeError):
    """A prompt, or a prompt and its reply, that the model's context does not hold."""


class KeyeWarning(_Worded, UserWarning):
    """A setting that was not honoured, or only in part. The command line prints it as a note."""


class ScopeWarning(KeyeWarning):
    """A question or a video is beyond what a small model knows or was measured on."""


_collected: ContextVar[list[KeyeWarning] | None] = ContextVar("collected", default=None)


def warn(warning: KeyeWarning, *, stacklevel: int = 1) -> None:
    """Gives a warning, and adds it to the list of `collect_warnings` around this call, if there is one."""
    if (collected := _collected.get()) is not None:
        collected.append(warning)
    warnings.warn(warning, stacklevel=stacklevel + 1)


@contextmanager
def collect_warnings() -> Iterator[list[KeyeWarning]]:
    """A list of the warnings that `warn` gives inside this block, in this thread or task. They are still given."""
    collected: list[KeyeWarning] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is probably a typing error of: other case or separators, or one or two characters
    added, left out, changed or swapped. None where there is none, also for a name that is known."""
    plain = _plain(name)
    if len(plain) > 64:
        return None
    best: tuple[int, str] | None = None
    for other in sorted(known):
        if other == name:
            return None
        target = _plain(other)
        most = 0 if len(target) < 3 else 1 if max(len(plain), len(target)) <= 5 else 2
        if abs(len(plain) - len(target)) <= most and (distance := _edits(plain, target)) <= most:
            best = min(best or (distance, other), (distance, other))
    return None if best is None else best[1]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _edits(left: str, right: str) -> int:
    """Edit distance in which swapping neighbours counts as one edit (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, above, row = row, before, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
