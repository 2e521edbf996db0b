"""Parts of a video as video files of their own: H.264 and AAC in MP4, upright, with square pixels.

Decoding happens in the decode worker under its limits; this side only encodes the frames and samples that it receives.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from keye.config.media import DEFAULTS, MediaOptions
from keye.files import MARK, check_output, complete_file, has_mark, unwritable
from keye.media.info import VideoInfo
from keye.media.notes import Note, emit
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Reference, Source, fetch_source
from keye.media.video import DecodeLimits, VideoReader

#: A clip is at least this long, in seconds; a shorter interval is extended evenly to both sides.
MIN_CLIP = 0.5
_TIME_BASE = Fraction(1, 90_000)
_MAX_STEM = 80
#: The number of BT.709 among matrices, primaries and transfer characteristics (ITU-T H.273).
_BT709 = 1

#: Called with (seconds written, seconds in all), rounded.
Progress = Callable[[int, int], None]


def cut_clips(
    source: Reference,
    intervals: Sequence[tuple[float, float]],
    folder: Path,
    *,
    options: MediaOptions = DEFAULTS,
    limits: DecodeLimits | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    prefix: str = "",
) -> list[Path]:
    """Writes a clip for each interval of (start, end) seconds and returns the paths, in the intervals' order.

    Files are called `NAME-001-12.5s-20.0s.mp4` after the source, the interval's number and its times, with `prefix`
    before (see `clip_prefixes`). A clip shows
    what is on display from `start` on and lasts exactly until `end`; times are those that players show. Intervals are
    clamped to the pictures of the video, shorter ones than `MIN_CLIP` extended, those outside left out. The sound of
    that time goes with them, in mono or stereo; where it cannot be decoded a note says so. Of `options` the track and
    deinterlacing count; of high dynamic range always a clip of standard range is made. The files appear when all are
    complete, and replace clips of the same names; other files only with `overwrite`. Raises `MediaError` when the video
    cannot be read, and `KeyeError` when the folder cannot be written, which is then left as it was.
    """
    source = fetch_source(source)
    stem = prefix + _stem_of(source)
    with VideoReader(source, limits, track=options.track) as reader:
        displayed = reader.info.start_offset, reader.info.duration
        spans = {i: span for i, pair in enumerate(intervals, 1) if (span := fit_interval(pair, *displayed))}
        total, done = sum(end - start for start, end in spans.values()), 0.0
        names = {n: f"{stem}-{n:03d}-{start:.1f}s-{end:.1f}s.mp4" for n, (start, end) in spans.items()}
        if spans and reader.info.sound is not None and not reader.info.sound.is_readable:
            emit(reader.info.name, [_no_sound(reader.info)])
        with _folder(folder), ExitStack() as drafts:
            for name in names.values():
                check_output(folder / name, has_mark, overwrite=overwrite)
            for number, (start, end) in spans.items():
                draft = drafts.enter_context(complete_file(folder / names[number]))
                plan = _plan(reader.info, start, end, options)
                for seconds in _write(draft, reader, plan, (start, end)):
                    done += seconds
                    if progress is not None:
                        progress(round(done), round(total))
    return [folder / name for name in names.values()]


def _stem_of(source: Source) -> str:
    # A temporary file has a name of its own that says nothing.
    name = source.path.name if source.path is not None and source.keep is None else source.name.replace(" ", "-")
    return Path(name).stem[:_MAX_STEM] if source.path is not None else "clip"


def clip_prefixes(sources: Sequence[Source]) -> list[str]:
    """What the clips of each video begin with, so that those of videos of the same name do not replace each other: the
    number of the video, or nothing where all names differ."""
    stems = {_stem_of(source).casefold() for source in sources}
    return [f"{number}-" if len(stems) < len(sources) else "" for number in range(1, len(sources) + 1)]


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Makes a folder with those above it; where the block fails, they are removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise unwritable(folder, error) from None
        raise


def fit_interval(interval: tuple[float, float], begin: float, end: float) -> tuple[float, float] | None:
    """The interval inside begin..end, where pictures are shown, at least `MIN_CLIP` long if that is; None if it lies
    outside."""
    start, stop = max(interval[0], begin), min(interval[1], end)
    if start >= end or interval[1] < begin:
        return None
    if stop - start < MIN_CLIP:
        middle = (start + stop) / 2
        start = max(begin, min(middle - MIN_CLIP / 2, end - MIN_CLIP))
        stop = min(end, start + MIN_CLIP)
    return start, stop


def _no_sound(info: VideoInfo) -> Note:
    assert info.sound is not None
    return Note(f"its sound ({info.sound.codec}) cannot be decoded here: clips are written without it")


def _write(draft: Path, reader: VideoReader, plan: VideoPlan, span: tuple[float, float]) -> Iterator[float]:
    """Writes a clip; yields the seconds of each frame that was written."""
    start, end = span
    times = [round(max(time - start, 0.0) / _TIME_BASE) for time in plan.timestamps]
    ends = [*times[1:], round((end - start) / _TIME_BASE)]
    durations = {begin: max(1, stop - begin) for begin, stop in zip(times, ends, strict=True)}
    with av.open(
        str(draft.absolute()), "w", format="mp4", options={"video_track_timescale": str(_TIME_BASE.denominator)}
    ) as container:
        container.metadata["comment"] = MARK
        encoder = _add_video(container, reader.info, plan)
        sound = deque(_encode_sound(container, reader, span))
        convert = VideoReformatter()
        for pixels, time in zip(reader.frames(plan), times, strict=True):
            picture = convert.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"),
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
            )  # fmt: skip
            picture.pts, picture.time_base = time, _TIME_BASE
            _mux(container, encoder.encode(picture), durations)
            while sound and (sound[0].dts or 0) * sound[0].time_base <= time * _TIME_BASE:
                container.mux(sound.popleft())
            yield float(durations[time] * _TIME_BASE)
        _mux(container, encoder.encode(None), durations)
        container.mux(list(sound))


def _add_video(container: OutputContainer, info: VideoInfo, plan: VideoPlan) -> VideoStream:
    # Without B-frames packets come in the order of time, and the file needs no edit list.
    encoder = container.add_stream("libx264", rate=max(1, round(info.fps)),
                                   options={"crf": "18", "preset": "veryfast", "bf": "0"})  # fmt: skip
    encoder.width, encoder.height, encoder.pix_fmt = plan.width, plan.height, "yuv420p"
    encoder.codec_context.time_base = _TIME_BASE
    encoder.codec_context.sample_aspect_ratio = Fraction(1)
    # Named, since players guess by the size, and not all alike.
    encoder.codec_context.colorspace = encoder.codec_context.color_primaries = _BT709
    encoder.codec_context.color_trc = _BT709
    return encoder


def _encode_sound(container: OutputContainer, reader: VideoReader, span: tuple[float, float]) -> list[Packet[Any]]:
    """The packets of the sound between two times, whose stream is added to the file; none, and no stream, where the
    video has no sound then. All before the pictures, since the worker gives one after the other: 24 KB a second."""
    if reader.info.sound is None or not reader.info.sound.is_readable:
        return []
    rate, channels = reader.sound_form
    layout = "mono" if channels == 1 else "stereo"
    encoder = None
    packets: list[Packet[Any]] = []
    done = 0
    for samples in reader.sound(*span):
        if encoder is None:
            encoder = container.add_stream("aac", rate=rate, layout=layout, options={"b": str(96_000 * channels)})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, done, Fraction(1, rate)
        packets += encoder.encode(frame)
        done += len(samples)
    if reader.sound_faults:
        state = "in part damaged, and silent there" if packets else "damaged, and left out"
        place = f"{span[0]:.1f} to {span[1]:.1f} s"
        emit(reader.info.name, [Note(f"its sound from {place} is {state}")])
    return packets + (encoder.encode(None) if encoder is not None else [])


def _mux(container: Any, packets: Sequence[Any], durations: dict[int, int]) -> None:
    for packet in packets:
        packet.duration = durations[packet.pts]
        container.mux(packet)


def _plan(info: VideoInfo, start: float, end: float, options: MediaOptions) -> VideoPlan:
    """All frames on display between two times, at the size that players show (H.264 needs even sides)."""
    first = max(bisect_right(info.timestamps, start + 1e-6) - 1, 0)
    last = max(bisect_left(info.timestamps, end - 1e-6), first + 1)
    size = max(2, info.height // 2 * 2), max(2, info.width // 2 * 2)
    looks = MediaOptions(deinterlace=options.deinterlace, tone_map=True)
    return VideoPlan.of(info, range(first, last), size, tokens_per_frame=0, rate=info.fps, options=looks)
