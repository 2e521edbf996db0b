"""How the pictures of a file are shown, on the side that plans and receives: facts, notes, and frames made upright.

`keye.media.decode.display` finds the facts out where the file is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from keye.errors import Option
from keye.media.notes import Note
from keye.media.options import MediaOptions
from keye.media.pixels.tone_map import to_sdr

if TYPE_CHECKING:
    from keye.media.plan import VideoPlan
    from keye.media.video import VideoInfo

#: Changes of size that a note lists.
_LISTED = 5
_TRANSFERS = ("sdr", "pq", "hlg")


def picture_fields(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `VideoInfo`, from the worker's facts. Raises `ValueError` for impossible ones."""
    size, stored = tuple(facts["shown"]), (facts["width"], facts["height"])
    if len(size) != 2 or min(*size, *stored) < 1 or facts["transfer"] not in _TRANSFERS or facts["rotation"] % 90:
        raise ValueError("impossible facts of pictures")
    if facts["aspect"] is not None and not all(isinstance(value, int) for value in facts["aspect"]):
        raise ValueError("impossible shape of pixels")
    tracks = tuple(facts["tracks"])
    if not 1 <= facts["track"] <= len(tracks) or not all(isinstance(one, str) and one.isprintable() for one in tracks):
        raise ValueError("impossible tracks")
    if facts["rotation"] % 180:
        size, stored = size[::-1], stored[::-1]
    return {
        "width": size[0], "height": size[1], "stored_size": None if stored == size else stored,
        "rotation": facts["rotation"] % 360, "mirrored": bool(facts["mirrored"]), "transfer": facts["transfer"],
        "track": facts["track"], "tracks": tracks,
    }  # fmt: skip


def picture_notes(info: VideoInfo, facts: Mapping[str, Any]) -> Iterator[Note]:
    """Where pictures are shown otherwise than the container says, or it leaves a choice."""
    if len(info.tracks) > 1 and not facts["track_asked"]:
        listed = "; ".join(info.tracks)
        yield Note(f"it has {len(info.tracks)} video tracks ({listed}); track {info.track} is read: choose with {{}}",
                   (Option("track"),))  # fmt: skip
    if not facts["exact_orientation"]:
        yield Note(f"it asks to be turned by no quarter turn; the nearest, {info.rotation} degrees, is used")
    if not facts["aspect_believed"]:
        width, height = facts["aspect"]
        yield Note(f"it says that its pixels are {width}:{height}, which cannot be; they are taken as square")


def size_notes(info: VideoInfo, changes: Sequence[tuple[int, int, int]]) -> Iterator[Note]:
    """The note of pictures that change their size: (time in units of the file, width, height as stored)."""
    if changes:
        times = info.seconds(time for time, _, _ in changes)
        listed = [f"{w}x{h} from {time:.1f} s on" for time, (_, w, h) in zip(times, changes, strict=True)]
        more = f" and so on, {len(listed)} changes" if len(listed) > _LISTED else ""
        yield Note(f"its pictures change their size: {', '.join(listed[:_LISTED])}{more}; all are stretched to the "
                   f"{info.width}x{info.height} of the first")  # fmt: skip


def as_read(info: VideoInfo, options: MediaOptions) -> VideoInfo:
    """The facts under `options`, with notes on what these make of the pictures."""
    notes = list(info.notes)
    if info.stored_size is not None:
        width, height = info.stored_size
        if options.strict_official:
            info = dataclasses.replace(info, width=width, height=height, stored_size=None)
        else:
            notes.append(Note(f"its pixels are not square: {width}x{height} is shown as {info.width}x{info.height}"))
    if info.transfer != "sdr" and not options.tone_map and not options.strict_official:
        notes.append(Note(
            "it has high dynamic range ({}), and its frames look pale: {} makes them ones of standard range",
            (info.transfer.upper(), Option("tone_map")),
        ))  # fmt: skip
    elif info.transfer == "sdr" and options.tone_map:
        notes.append(Note("it has standard range already, so that {} has no effect", (Option("tone_map"),)))
    return dataclasses.replace(info, notes=tuple(notes))


def shown(frame: NDArray[np.uint8], plan: VideoPlan) -> NDArray[np.uint8]:
    """A frame as it is shown, uint8 RGB [height, width, 3], of one as it is stored."""
    turned = np.rot90(frame, plan.rotation // 90)
    upright = np.ascontiguousarray(turned[:, ::-1] if plan.mirrored else turned)
    return upright if plan.tone_map is None else to_sdr(upright, plan.tone_map)
