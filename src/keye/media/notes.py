"""Notes and warnings about a medium: where what is used differs from what the file declares or the request asks for.

A note is one sentence about one medium, without its name. `VideoInfo.notes` holds those of a file; making a plan emits
each once as a `KeyeWarning` and keeps it in the plan. Warnings about options look at the result, not at its cause;
under `strict_official`, which asks for the official code's way, there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeWarning, Option, warn
from keye.media.sizes import Size, round_to_tokens

#: Seconds by which times may differ without a note: they are displayed with one decimal.
VISIBLE = 0.1

#: Seconds (first, last) in which pictures are damaged.
Places = Sequence[tuple[float, float]]

#: Places that a sentence lists; seconds between damaged frames of one place; seconds that are displayed as one time.
_LISTED, _NEAR, _SAME_TIME = 5, 1.0, 0.05

#: Options that files, or pictures in memory, have no use for, and why.
_FILE_ONLY = dict.fromkeys(("adaptive_budget", "track", "deinterlace", "tone_map"), "it is a list of pictures")
_TIMED_ONLY = dict.fromkeys(("video_start", "video_end"), "its times are not known; give timestamps or fps")
_LIST_ONLY = {"timestamps": "a file has times of its own"}


@dataclass(frozen=True)
class Note:
    """A sentence with `{}` for each of `parts`: texts, or `Option`s, which each interface spells in its own way."""

    sentence: str
    parts: tuple[object, ...] = ()

    def __str__(self) -> str:
        return str(KeyeWarning(self.sentence, *self.parts))

    def warning(self, name: str) -> KeyeWarning:
        """The note as a warning about the medium `name`."""
        return KeyeWarning("{}: " + (self.sentence if self.parts else "{}"), name, *(self.parts or (self.sentence,)))


def emit(name: str, notes: Iterable[Note], *, stacklevel: int = 2) -> None:
    """Warns of each note about the medium `name`."""
    for note in notes:
        warn(note.warning(name), stacklevel=stacklevel + 1)


def note_damage(places: Places) -> Iterator[Note]:
    """The note of a file in which these places are damaged; none if there is no such place."""
    if places:
        yield Note(
            f"parts of the file are damaged or missing: its pictures at {format_places(places)} are made up from those "
            "around them; {} refuses such files",
            (Option("strict_media"),),
        )


def warn_decoded_damage(name: str, seconds: Sequence[float], known: Places) -> KeyeWarning | None:
    """The warning of frames at `seconds` that turned out to be damaged; None where all of them were `known` to be."""
    places: list[tuple[float, float]] = []
    for second in sorted(seconds):
        if any(first <= second <= last for first, last in known):
            continue
        if places and second - places[-1][1] <= _NEAR:
            places[-1] = (places[-1][0], second)
        else:
            places.append((second, second))
    return next(iter(note_damage(places))).warning(name) if places else None


def format_places(places: Places) -> str:
    """Such as "2.4 s, 7.0 to 8.1 s and 12 more places"."""
    words = [
        f"{first:.1f} s" if last - first < _SAME_TIME else f"{first:.1f} to {last:.1f} s"
        for first, last in places[:_LISTED]
    ]
    if len(places) > _LISTED:
        more = len(places) - _LISTED
        return f"{', '.join(words)} and {more:,} more place{'s' if more > 1 else ''}"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def warn_image_options(name: str, size: Size, config: ProcessorConfig, options: MediaOptions) -> None:
    """Warns where an image, encoded at `size` (height, width), breaks the limits that were asked for."""
    if not options.strict_official:
        _warn_size(name, size, config, options, "")


def warn_video_options(
    name: str,
    frames: int,
    size: Size,
    config: ProcessorConfig,
    options: MediaOptions,
    *,
    seconds: float | None = None,
    sampled: int | None = None,
) -> None:
    """Warns where a video of `frames` frames, encoded at `size` (height, width), is not what was asked for.

    Of a file `seconds` is the length of the part that is used, and `sampled` the number of times at which frames were
    looked up, of which some may share a frame; of pictures in memory neither is given.
    """
    if options.strict_official:
        return
    useless = _FILE_ONLY if seconds is None else _LIST_ONLY
    if seconds is None and options.timestamps is None and options.fps is None:
        useless = {**useless, **_TIMED_ONLY}
    _warn_no_effect(name, config, options, useless)
    got = f"{frames} frames"
    if options.nframes is not None and options.nframes != frames:
        _warn_unmet(name, Option("nframes", options.nframes), got)
    if options.min_frames is not None and options.min_frames > frames:
        _warn_unmet(name, Option("min_frames", options.min_frames), got)
    if options.max_frames is not None and options.max_frames < frames:
        _warn_unmet(name, Option("max_frames", options.max_frames), got)
    if options.fps is not None and seconds is not None and sampled is not None:
        wanted = int(min(seconds * options.fps, options.max_frames or seconds * options.fps))
        # A frame less than a multiple, or a percent (30 of 29.97 frames a second), is rounding.
        if sampled <= min(0.99 * wanted, wanted - config.frame_factor):
            _warn_unmet(name, Option("fps", options.fps), f"{sampled / seconds:.3g} frames a second")
    _warn_size(name, size, config, options, " a frame")
    total, pixels = options.video_total_pixels, frames * size[0] * size[1]
    if total is not None and pixels > config.release.allowed_pixels(total, frames, config.token_pixels):
        _warn_unmet(name, Option("video_total_pixels", total), f"{pixels:,} pixels in all")


def _warn_no_effect(name: str, config: ProcessorConfig, options: MediaOptions, useless: dict[str, str]) -> None:
    reasons = {option: why for option, why in useless.items() if getattr(options, option) not in (None, False)}
    if options.adaptive_budget and not config.release.adaptive_shares:
        reasons["adaptive_budget"] = f"Keye-VL {config.release.name} has none"
    elif options.adaptive_budget and options.video_count > 1:
        reasons["adaptive_budget"] = "several videos share the whole budget"
    if options.min_frame_similarity is not None and not config.release.classifies_frames:
        reasons["min_frame_similarity"] = f"Keye-VL {config.release.name} has no slow and fast frames"
    for option, why in reasons.items():
        _warn(KeyeWarning("{} has no effect on {}: {}", Option(option), name, why))


def _warn_size(name: str, size: Size, config: ProcessorConfig, options: MediaOptions, each: str) -> None:
    height, width = size
    got = f"{width}x{height} pixels{each}"
    if options.resized is not None and size != round_to_tokens(*options.resized, config.factor):
        size_options = Option("resized_height", options.resized[0]), Option("resized_width", options.resized[1])
        _warn(KeyeWarning("{} and {} cannot be met for {}: it gets {}", *size_options, name, got))
    if options.max_pixels is not None and height * width > options.max_pixels:
        _warn_unmet(name, Option("max_pixels", options.max_pixels), got)
    # Sides are whole tokens: what one token more on either side would meet is rounding.
    if options.min_pixels is not None and (height + config.factor) * (width + config.factor) <= options.min_pixels:
        _warn_unmet(name, Option("min_pixels", options.min_pixels), got)


def _warn_unmet(name: str, option: Option, got: str) -> None:
    _warn(KeyeWarning("{} cannot be met for {}: it gets {}", option, name, got))


def _warn(warning: KeyeWarning) -> None:
    warn(warning, stacklevel=4)
