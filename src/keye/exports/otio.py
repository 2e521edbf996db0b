"""OpenTimelineIO's own format, by its library (extra `export`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keye.errors import missing_package
from keye.exports.ranges import Cut, Event, MediaReference
from keye.files import MARK

if TYPE_CHECKING:
    from opentimelineio import opentime, schema


def to_otio(cut: Cut) -> str:
    """A timeline with a video track, one for sound where a file has any, and a marker for each moment."""
    try:
        from opentimelineio import schema
    except ImportError:
        raise missing_package("opentimelineio", "an otio file", "export") from None
    timeline = schema.Timeline(cut.title, metadata={"keye": {"written": MARK, "notes": list(cut.notes)}})
    timeline.global_start_time = _times(cut, cut.start, 0).start_time
    tracks = [schema.Track("V1", kind=schema.TrackKind.Video)]
    if any(media.channels for media in cut.media):
        tracks.append(schema.Track("A1", kind=schema.TrackKind.Audio))
    for track in tracks:
        for clip in _clips(cut, with_markers=track.kind == schema.TrackKind.Video):
            track.append(clip)
        timeline.tracks.append(track)
    if cut.mode == "markers":
        timeline.tracks.markers.extend(_marker(cut, event, event.first) for event in cut.events)
    return timeline.to_json_string(indent=1) + "\n"


def _clips(cut: Cut, *, with_markers: bool) -> list[schema.Clip]:
    if cut.mode == "markers":
        media = cut.media[0]
        return [_clip(cut, media, 0, media.frames(cut.rate), None)]
    return [
        _clip(cut, event.media, event.source_first, event.source_end, event if with_markers else None)
        for event in cut.events
    ]


def _clip(cut: Cut, media: MediaReference, begin: int, end: int, event: Event | None) -> schema.Clip:
    from opentimelineio import schema

    first = media.first_frame(cut.rate)
    reference = schema.ExternalReference(media.url, _times(cut, first, media.frames(cut.rate)))
    reference.name = media.name
    clip = schema.Clip(media.name, reference, _times(cut, first + begin, end - begin))
    if event is not None:
        clip.markers.append(_marker(cut, event, first + event.first))
    return clip


def _marker(cut: Cut, event: Event, first: int) -> schema.Marker:
    from opentimelineio import schema

    source = event.range
    facts = {"probability": source.probability, "start": source.start, "end": source.end, "note": source.note}
    return schema.Marker(
        source.label, _times(cut, first, event.end - event.first), schema.MarkerColor.CYAN, {"keye": facts},
        source.comment,
    )  # fmt: skip


def _times(cut: Cut, first: int, frames: int) -> opentime.TimeRange:
    from opentimelineio import opentime

    rate = float(cut.rate.value)
    return opentime.TimeRange(opentime.RationalTime(first, rate), opentime.RationalTime(frames, rate))
