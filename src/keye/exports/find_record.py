"""Puts together the record of a search in one video: its facts, spans that were looked at, pictures of moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import MediaError
from keye.exports.ranges import ExportRange, ranges_of
from keye.exports.record import Picture, Record, RecordedVideo
from keye.media.content import source_hash
from keye.media.source.fetch import Source
from keye.media.thumbnails import make_thumbnails
from keye.moments import Coverage, FindResult
from keye.units import plural

#: Pictures of moments, and the height of pictures in pixels.
_OF_MOMENTS: Final = 24
_HEIGHT: Final = 120


def find_record(
    result: FindResult, source: Source, model: Mapping[str, Any], prompts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Record:  # fmt: skip
    """The record of a search in a video; `model` are facts about the model and its weights. Reads the file. Blocks."""
    ranges, coverage = ranges_of([*result.moments, *result.weaker], result.query), result.coverage
    facts = {
        "looked at": "; ".join(_span_words(coverage)) or "nothing",
        "places looked at closely": f"{coverage.places:,}", "share looked at": f"{coverage.share:.1%}",
        "tokens": f"{coverage.index_tokens:,} of the index, {coverage.query_tokens:,} of the question",
    }  # fmt: skip
    video = RecordedVideo(
        result.video, source_hash(source).hex(), source.size, coverage.duration, (), coverage.unseen, facts,
        read_pictures(source, moment_times(ranges)), coverage.frames,
        [(span.start, span.end) for span in coverage.seen],
    )  # fmt: skip
    presence = {} if result.presence is None else {"probability that it is there": f"{result.presence:.1%}"}
    threshold = {"threshold": f"{result.threshold:.0%}", "ended early": "yes" if result.stopped else "no"}
    seconds = {"seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items())}
    return Record(
        "keye find", result.query, format_now(), model, dict(settings or {}), prompts, "", ranges,
        {**presence, **threshold, **seconds}, [note.text for note in result.notes], [video], result.to_dict(),
    )  # fmt: skip


def moment_times(ranges: Sequence[ExportRange]) -> list[float]:
    """Times of which a record shows pictures: begin and middle of the first moments."""
    return [time for item in ranges[: _OF_MOMENTS // 2] for time in (item.start, (item.start + item.end) / 2)]


def read_pictures(source: Source, times: Sequence[float], options: MediaOptions = DEFAULTS) -> list[Picture]:
    """Frames at these times; none where the video cannot be read again."""
    try:
        thumbnails = make_thumbnails(source, sorted(set(times)), _HEIGHT, options=options)
    except MediaError:
        return []
    return [Picture(picture.timestamp, picture.jpeg) for picture in thumbnails]


def format_now() -> str:
    """The time of day in words."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span_words(coverage: Coverage) -> list[str]:
    spans = [f"{span.start:.1f} to {span.end:.1f} s every {span.spacing:.2g} s" + (" (closely)" if span.close else "")
             for span in coverage.seen]  # fmt: skip
    return spans[:50] + ([f"and {plural(len(spans) - 50, 'more span')}"] if len(spans) > 50 else [])
