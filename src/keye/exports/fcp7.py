"""Final Cut Pro 7 XML (xmeml 5), the one file that brings clips and markers into Premiere; Resolve reads it as well.

Written here and not by otio-fcp-adapter, which calls every timecode non-drop, also at 29.97 and 59.94, counts markers
from the timecode of the source instead of its first frame, and leaves out sound and the size of pictures.
"""

from __future__ import annotations

from fractions import Fraction
from xml.etree.ElementTree import Element

from keye.exports.ranges import Cut, Event, MediaReference
from keye.exports.rate import FrameRate
from keye.exports.xml import add, document

#: Names of pixel shapes by (stored width, height).
_ASPECTS = {
    (720, 480): "NTSC-601", (720, 486): "NTSC-601", (720, 576): "PAL-601", (960, 720): "HD-(960x720)",
    (1280, 1080): "HD-(1280x1080)", (1440, 1080): "HD-(1440x1080)",
}  # fmt: skip


def to_fcp7(cut: Cut) -> str:
    """A sequence of clips with a marker on each, or of the whole video with markers in the sequence."""
    root = Element("xmeml", version="5")
    sequence = add(root, "sequence", id="sequence-1")
    add(sequence, "name", cut.title)
    add(sequence, "duration", cut.frames)
    _add_rate(sequence, cut.rate)
    _add_timecode(sequence, cut.rate, cut.start)
    media = add(sequence, "media")
    spans = _spans(cut)
    declared: set[MediaReference] = set()
    video = add(media, "video")
    main = cut.media[0]
    shape = add(add(video, "format"), "samplecharacteristics")
    _add_rate(shape, cut.rate)
    _add_size(shape, main.width, main.height, "square", anamorphic=False)
    track = add(video, "track")
    for span in spans:
        _add_clip(track, cut, span, "video", 0, declared)
    channels = min(2, max((file.channels for file in cut.media), default=0))
    if channels:
        audio = add(media, "audio")
        add(audio, "numOutputChannels", channels)
        for channel in range(1, channels + 1):
            track = add(audio, "track")
            for span in spans:
                if span.media.channels >= channel:
                    _add_clip(track, cut, span, "audio", channel, declared)
    if cut.mode == "markers":
        for event in cut.events:
            _add_marker(sequence, event, event.first, event.end)
    return document(root, "xmeml")


class _Span:
    """A clip of the sequence: frames `begin` to before `end` of `media`, from `record` on; `event` is None for the
    whole video."""

    def __init__(self, number: int, media: MediaReference, begin: int, end: int, record: int, event: Event | None):
        self.number, self.media, self.begin, self.end = number, media, begin, end
        self.record, self.event = record, event


def _spans(cut: Cut) -> list[_Span]:
    if cut.mode == "markers":
        return [_Span(1, cut.media[0], 0, cut.media[0].frames(cut.rate), 0, None)]
    return [_Span(e.number, e.media, e.source_first, e.source_end, e.record, e) for e in cut.events]


def _add_clip(track: Element, cut: Cut, span: _Span, kind: str, channel: int, declared: set[MediaReference]) -> None:
    media, number = span.media, cut.number_of(span.media)
    item = add(track, "clipitem", id=f"clipitem-{span.number}-{kind}{channel or ''}")
    add(item, "masterclipid", f"masterclip-{number}")
    add(item, "name", media.name)
    add(item, "enabled", "TRUE")
    add(item, "duration", media.frames(cut.rate))
    _add_rate(item, cut.rate)
    add(item, "start", span.record)
    add(item, "end", span.record + span.end - span.begin)
    add(item, "in", span.begin)
    add(item, "out", span.end)
    _add_file(item, cut, media, declared)
    if kind == "audio":
        source = add(item, "sourcetrack")
        add(source, "mediatype", "audio")
        add(source, "trackindex", channel)
    for other, trackindex in [("video", 0), *(("audio", c) for c in range(1, min(2, media.channels) + 1))]:
        link = add(item, "link")
        add(link, "linkclipref", f"clipitem-{span.number}-{other}{trackindex or ''}")
        add(link, "mediatype", other)
        add(link, "trackindex", trackindex or 1)
        add(link, "clipindex", span.number)
    if kind == "video" and span.event is not None:
        _add_marker(item, span.event, span.event.first, span.event.end)
        add(add(item, "comments"), "mastercomment1", span.event.text)


def _add_file(item: Element, cut: Cut, media: MediaReference, declared: set[MediaReference]) -> None:
    """The file, in full where it is named first."""
    file = add(item, "file", id=f"file-{cut.number_of(media)}")
    if media in declared:
        return
    declared.add(media)
    add(file, "name", media.name)
    # The form of Final Cut Pro 7, which Premiere expects too.
    add(file, "pathurl", media.url.replace("file:///", "file://localhost/", 1))
    _add_rate(file, cut.rate)
    add(file, "duration", media.frames(cut.rate))
    _add_timecode(file, cut.rate, media.first_frame(cut.rate))
    content = add(file, "media")
    shape = add(add(content, "video"), "samplecharacteristics")
    _add_rate(shape, cut.rate)
    stored = media.stored_width or media.width
    aspect = _ASPECTS.get((stored, media.height), "square") if media.stored_width else "square"
    is_wide = aspect.endswith("601") and Fraction(media.width, media.height) > Fraction(3, 2)
    _add_size(shape, stored if aspect != "square" else media.width, media.height, aspect, anamorphic=is_wide)
    if media.channels:
        audio = add(content, "audio")
        shape = add(audio, "samplecharacteristics")
        add(shape, "depth", 16)
        add(shape, "samplerate", media.sample_rate)
        add(audio, "channelcount", media.channels)


def _add_marker(parent: Element, event: Event, begin: int, end: int) -> None:
    marker = add(parent, "marker")
    add(marker, "comment", event.range.comment)
    add(marker, "name", event.range.label)
    add(marker, "in", begin)
    add(marker, "out", end)


def _add_rate(parent: Element, rate: FrameRate) -> None:
    element = add(parent, "rate")
    add(element, "timebase", rate.base)
    add(element, "ntsc", "TRUE" if rate.is_ntsc else "FALSE")


def _add_timecode(parent: Element, rate: FrameRate, frame: int) -> None:
    element = add(parent, "timecode")
    _add_rate(element, rate)
    add(element, "string", rate.timecode(frame))
    add(element, "frame", frame)
    add(element, "displayformat", "DF" if rate.drop_frame else "NDF")


def _add_size(shape: Element, width: int, height: int, aspect: str, *, anamorphic: bool) -> None:
    add(shape, "width", width)
    add(shape, "height", height)
    add(shape, "anamorphic", "TRUE" if anamorphic else "FALSE")
    add(shape, "pixelaspectratio", aspect)
    add(shape, "fielddominance", "none")
