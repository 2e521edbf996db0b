"""Parts of video files that are damaged or missing: told in a note, or refused under `strict_media`.

The decode worker conceals damage as FFmpeg does and says where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from keye.errors import KeyeWarning, MediaError, Option
from keye.media.notes import Note
from keye.media.options import MediaOptions

if TYPE_CHECKING:
    from keye.media.video import VideoInfo

#: Seconds (first, last) in which pictures are damaged.
Places = Sequence[tuple[float, float]]

#: Places that a sentence lists.
_LISTED = 5
#: Seconds between damaged frames that make one place.
_NEAR = 1.0
#: Seconds that a sentence shows as one.
_ONE = 0.05


def damage_notes(places: Places) -> Iterator[Note]:
    """The note of a file in which these places are damaged; none if there is no such place."""
    if places:
        yield Note(
            f"parts of the file are damaged or missing: its pictures at {in_words(places)} are made up from those "
            "around them; {} refuses such files",
            (Option("strict_media"),),
        )


def decoded_damage(name: str, seconds: Sequence[float], known: Places) -> KeyeWarning | None:
    """The warning of frames at `seconds` that turned out to be damaged; None where all of them were `known` to be."""
    found: list[tuple[float, float]] = []
    for second in sorted(seconds):
        if any(first <= second <= last for first, last in known):
            continue
        if found and second - found[-1][1] <= _NEAR:
            found[-1] = (found[-1][0], second)
        else:
            found.append((second, second))
    return next(iter(damage_notes(found))).warning(name) if found else None


def check_whole(info: VideoInfo, options: MediaOptions) -> None:
    """Raises `MediaError` where the part that was asked for reaches into what the file declares but lacks; under
    `strict_media` for any file that ends early or is damaged."""
    end, strict = options.video_end, options.strict_media
    if info.cut_short and (strict or end is None or end > info.duration):
        option = Option("strict_media") if strict else Option("video_end", int(info.duration * 10) / 10)
        raise MediaError(
            "{} is cut short: {:.1f} of {:.1f} s can be read; download it again or " + ("leave {} out" if strict else
            "pass {}"), info.name, info.duration, info.declared_duration, option,
        )  # fmt: skip
    if strict and info.ends_early:
        raise MediaError(
            "{} lacks bytes at its end; download it again or leave {} out", info.name, Option("strict_media")
        )  # fmt: skip
    if strict and info.damage:
        raise MediaError(
            "{} is damaged at {}; download it again or leave {} out",
            info.name, in_words(info.damage), Option("strict_media"),
        )  # fmt: skip


def in_words(places: Places) -> str:
    """Such as "2.4 s, 7.0 to 8.1 s and 12 more places"."""
    words = [
        f"{first:.1f} s" if last - first < _ONE else f"{first:.1f} to {last:.1f} s" for first, last in places[:_LISTED]
    ]
    if len(places) > _LISTED:
        more = len(places) - _LISTED
        return f"{', '.join(words)} and {more:,} more place{'s' if more > 1 else ''}"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
