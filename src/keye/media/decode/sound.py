"""The sound of a video file inside the decode worker: its track, and the samples between two times. Standard library
and PyAV; nothing is decoded before sound is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from keye.media.decode.video_file import VideoFile
from keye.media.decode.wire import sound_form

#: Codecs of untrusted files that are decoded, beside uncompressed sound.
_CODECS = frozenset(
    "aac mp3 mp3float mp2 mp2float ac3 eac3 opus libopus vorbis libvorbis flac alac wmav1 wmav2 amrnb amrwb".split()
)
#: Seconds before the first sample from which on decoders run, so that they have what they need of the past.
_LEAD = 0.5
#: Seconds by which the time of a frame may differ from the samples before it without being a gap: roundings of clocks.
_JITTER = 0.01
_SAMPLE_BYTES = 4
_TIMECODE = re.compile(r"\d\d:[0-5]\d:[0-5]\d[:;.,]\d{2,3}")
_FACT = re.compile(r"[\w.-]{1,32}")


def find_timecode(container: InputContainer, stream: VideoStream) -> str | None:
    """The timecode of the first frame, as the file has it in a track or a tag of its own."""
    tables = [stream.metadata, container.metadata, *(other.metadata for other in container.streams)]
    for table in tables:
        for name, value in table.items():
            if name.lower() == "timecode" and _TIMECODE.fullmatch(value.strip()):
                return value.strip()
    return None


def describe_sound(video: VideoFile) -> dict[str, Any] | None:
    """Facts about the track that players choose; None without one."""
    stream = _find_track(video.container, video.stream)
    if stream is None:
        return None
    context = stream.codec_context
    if context is None or not context.rate or not context.layout.nb_channels:
        return {"codec": "unknown", "rate": 0, "channels": 0, "readable": False}
    name = context.name if _FACT.fullmatch(context.name) else "unknown"
    known = not video.opening.common_only or name in _CODECS or name.startswith("pcm_")
    # Where the clock of pictures was mended, that of sound would have to be mended alike.
    return {"codec": name, "rate": context.rate, "channels": context.layout.nb_channels,
            "readable": known and not video.has_joins}  # fmt: skip


class SoundReader:
    """Samples of the sound between two seconds of the file's own clock, exactly as many as the span has.

    Silent where the file has no sound. `faults` counts packets that do not decode.
    """

    def __init__(self, video: VideoFile, begin: float, end: float) -> None:
        stream = _find_track(video.container, video.stream)
        assert stream is not None
        self.video, self.begin = video, begin
        self.rate, self.channels = sound_form(stream.codec_context.rate, stream.codec_context.layout.nb_channels)
        self.total = round((end - begin) * self.rate)
        self.faults = self._done = 0

    def samples(self) -> Iterator[bytes]:
        """Float32, channels interleaved, at most a second at a time; nothing where the file has no sound then."""
        frames = self._decode(seek=True)
        first = next(frames, None)
        if first is None or self._place(first) > _JITTER * self.rate:  # begun too late: from the start then
            frames = self._decode(seek=False)
            first = next(frames, None)
        if first is None or self._place(first) >= self.total:
            return
        yield from self._fit(first, frames)
        yield from self._silence(self.total)

    def _fit(self, first: AudioFrame | None, rest: Iterator[AudioFrame]) -> Iterator[bytes]:
        frame, due = first, None
        size = self.channels * _SAMPLE_BYTES
        while frame is not None and self._done < self.total:
            place = self._place(frame)
            if due is not None and abs(place - due) <= _JITTER * self.rate:
                place = due
            due = place + frame.samples
            yield from self._silence(min(place, self.total))
            data = memoryview(frame.planes[0])[: frame.samples * size]
            part = data[max(0, self._done - place) * size : max(0, self.total - place) * size]
            self._done += len(part) // size
            for start in range(0, len(part), self.rate * size):
                yield bytes(part[start : start + self.rate * size])
            frame = next(rest, None)

    def _silence(self, until: int) -> Iterator[bytes]:
        while self._done < until:
            count = min(until - self._done, self.rate)
            self._done += count
            yield bytes(count * self.channels * _SAMPLE_BYTES)

    def _place(self, frame: AudioFrame) -> int:
        """The number of a frame's first sample, counted from `begin`."""
        assert frame.pts is not None and frame.time_base is not None
        return round((frame.pts * frame.time_base - Fraction(self.begin)) * self.rate)

    def _decode(self, *, seek: bool) -> Iterator[AudioFrame]:
        """Frames from a little before `begin` on, or from where the file begins, in the form that is given."""
        lead = self.begin - _LEAD
        stream = self._start(max(0.0, lead)) if seek else self._restart()
        layout = "mono" if self.channels == 1 else "stereo"
        resampler = AudioResampler("flt", layout, self.rate)
        for packet in self.video.container.demux(stream):
            try:
                decoded = stream.decode(packet)
            except av.error.FFmpegError:
                self.faults += 1
                continue
            for frame in decoded:
                if frame.pts is not None and frame.time is not None and frame.time >= lead - _LEAD:
                    yield from resampler.resample(frame)
        yield from resampler.resample(None)

    def _start(self, seconds: float) -> AudioStream:
        """The track, of which a packet before `seconds` comes next."""
        stream = _find_track(self.video.container, self.video.stream)
        assert stream is not None and stream.time_base is not None
        try:
            self.video.container.seek(int(seconds / stream.time_base), stream=stream)
            stream.codec_context.flush_buffers()
        except av.error.FFmpegError:
            return self._restart()
        return stream

    def _restart(self) -> AudioStream:
        self.video.reopen()
        stream = _find_track(self.video.container, self.video.stream)
        assert stream is not None
        return stream


def _find_track(container: InputContainer, stream: VideoStream) -> AudioStream | None:
    track = container.streams.best("audio", related=stream)
    return track if isinstance(track, AudioStream) else next(iter(container.streams.audio), None)
