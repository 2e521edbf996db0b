"""FCPXML 1.9 of Final Cut Pro; DaVinci Resolve reads it as well.

Written here and not by otio-fcpx-xml-adapter, which leaves the duration of a frame empty at 23.976, 29.97 and 59.94, so
that Final Cut Pro refuses the file and it cannot read it back itself, and knows neither drop-frame nor sound.
Times are fractions of a second that fall on frames: `frames * 1001/30000s`.
"""

from __future__ import annotations

from xml.etree.ElementTree import Element

from keye.exports.ranges import Cut, Event, MediaReference
from keye.exports.rate import FrameRate
from keye.exports.xml import add, document

#: Names that the format has for rates of sound.
_SAMPLE_RATES = {32_000: "32k", 44_100: "44.1k", 48_000: "48k", 88_200: "88.2k", 96_000: "96k"}


def to_fcpxml(cut: Cut) -> str:
    """A project of clips with a marker on each, or of the whole video with all markers on it."""
    root = Element("fcpxml", version="1.9")
    resources = add(root, "resources")
    main, mode = cut.media[0], "DF" if cut.rate.drop_frame else "NDF"
    frame = _time(cut.rate, 1)
    add(resources, "format", id="r1", frameDuration=frame, width=main.width, height=main.height)
    formats = {(main.width, main.height): "r1"}
    for number, media in enumerate(cut.media, 1):
        size = media.width, media.height
        if size not in formats:
            formats[size] = f"f{number}"
            add(resources, "format", id=formats[size], frameDuration=frame, width=media.width, height=media.height)
        _add_asset(resources, cut, media, f"a{number}", formats[size])
    event = add(add(root, "library"), "event", name=cut.title)
    project = add(event, "project", name=cut.title)
    channels = max(media.channels for media in cut.media)
    sequence = add(
        project, "sequence", format="r1", duration=_time(cut.rate, cut.frames), tcStart=_time(cut.rate, cut.start),
        tcFormat=mode, audioLayout=None if not channels else "mono" if channels == 1 else "stereo",
        audioRate=_SAMPLE_RATES.get(main.sample_rate, "48k") if channels else None,
    )  # fmt: skip
    spine = add(sequence, "spine")
    if cut.mode == "markers":
        clip = _add_clip(spine, cut, main, 0, main.frames(cut.rate), 0, formats)
        for item in cut.events:
            _add_marker(clip, cut, item)
    else:
        for item in cut.events:
            clip = _add_clip(spine, cut, item.media, item.source_first, item.source_end, item.record, formats)
            add(clip, "note", item.text)
            _add_marker(clip, cut, item)
    return document(root, "fcpxml")


def _add_asset(resources: Element, cut: Cut, media: MediaReference, name: str, format_name: str) -> None:
    rate = cut.rate
    asset = add(
        resources, "asset", id=name, name=media.name, start=_time(rate, media.first_frame(rate)),
        duration=_time(rate, media.frames(rate)), hasVideo=1, format=format_name, videoSources=1,
        hasAudio=1 if media.channels else None, audioSources=1 if media.channels else None,
        audioChannels=media.channels or None, audioRate=media.sample_rate or None,
    )  # fmt: skip
    add(asset, "media-rep", kind="original-media", src=media.url)


def _add_clip(
    spine: Element, cut: Cut, media: MediaReference, begin: int, end: int, record: int,
    formats: dict[tuple[int, int], str],
) -> Element:  # fmt: skip
    rate = cut.rate
    return add(
        spine, "asset-clip", ref=f"a{cut.number_of(media)}", offset=_time(rate, cut.start + record), name=media.name,
        start=_time(rate, media.first_frame(rate) + begin), duration=_time(rate, end - begin),
        format=formats[media.width, media.height], tcFormat="DF" if rate.drop_frame else "NDF",
        audioRole="dialogue" if media.channels else None,
    )  # fmt: skip


def _add_marker(clip: Element, cut: Cut, event: Event) -> None:
    """A marker in the time of the clip's source."""
    start = event.media.first_frame(cut.rate) + event.first
    add(clip, "marker", start=_time(cut.rate, start), duration=_time(cut.rate, event.end - event.first),
        value=event.range.label, note=event.range.comment or None)  # fmt: skip


def _time(rate: FrameRate, frames: int) -> str:
    seconds = rate.seconds(frames)
    if seconds.denominator == 1:
        return f"{seconds.numerator}s"
    # Over the rate's own numerator, as the program writes it, and not reduced.
    return f"{frames * rate.value.denominator}/{rate.value.numerator}s"
