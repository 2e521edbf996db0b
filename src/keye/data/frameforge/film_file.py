"""Films to .mp4 files: every piece is encoded once, and the file is made of copies of their packets."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye.data.frameforge.film import FILM_RATE, FILM_SIZE, Film, Piece, piece_clip
from keye.data.frameforge.render import render
from keye.files import complete_file

_RATE = Fraction(FILM_RATE)
#: Ticks of the clock a frame lasts; the clock counts milliseconds.
_CLOCK, _TICKS = Fraction(1, 1000), round(1000 / FILM_RATE)
#: Frames from one key frame to the next.
_KEY_FRAMES = 50
_SOUND_RATE, _SOUND_FRAME = 48_000, 1024
#: Whole periods of the tone in a frame of sound: every frame has the same samples, so one packet serves all.
_PERIODS = 9


def write_film(film: Film, path: str | os.PathLike[str], *, sound: bool = False) -> None:
    """Writes `film` as H.264 video of 640 x 360 and 12.5 frames per second, with a quiet tone as AAC if `sound`.

    The file appears at `path` only when it is complete.
    """
    with complete_file(Path(path)) as draft, av.open(
        str(draft), "w", format="mp4", options={"video_track_timescale": "1000"}
    ) as container:  # fmt: skip
        with av.open(io.BytesIO(_encode(film.pieces[0])), "r") as first:
            video = container.add_stream_from_template(first.streams.video[0])
        tone = _Tone(container) if sound else None
        video.time_base = _CLOCK
        for number, packet in enumerate(_packets(film)):
            packet.pts = packet.dts = number * _TICKS
            packet.duration, packet.time_base, packet.stream = _TICKS, _CLOCK, video
            container.mux(packet)
            if tone is not None:
                tone.write_until((number + 1) / FILM_RATE)


def _packets(film: Film) -> Iterator[Any]:
    left = film.frames
    for piece in film.pieces:
        with av.open(io.BytesIO(_encode(piece)), "r") as container:
            for packet in container.demux(video=0):
                if packet.size and left:
                    left -= 1
                    yield packet


@lru_cache(maxsize=256)
def _encode(piece: Piece) -> bytes:
    """A piece as a file in memory."""
    # No B-frames: packets come in the order of time, and their decoding clock starts at 0 without an edit list.
    options = {"crf": "24", "preset": "superfast", "bf": "0", "g": str(_KEY_FRAMES)}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"video_track_timescale": "1000"}) as container:
        encoder = container.add_stream("libx264", rate=_RATE, options=options)
        encoder.width, encoder.height = FILM_SIZE
        encoder.pix_fmt = "yuv420p"
        encoder.codec_context.time_base = _CLOCK
        encoder.codec_context.thread_count = 1
        for number, pixels in enumerate(render(piece_clip(piece), FILM_SIZE)):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = number * _TICKS, _CLOCK
            container.mux(encoder.encode(picture))
        container.mux(encoder.encode(None))
    return file.getvalue()


class _Tone:
    """A track of sound that goes on as the picture does."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._stream = container.add_stream("aac", rate=_SOUND_RATE, layout="mono", bit_rate=32_000)
        phase = 2 * np.pi * _PERIODS * np.arange(_SOUND_FRAME) / _SOUND_FRAME
        samples = np.sin(phase).astype(np.float32)[None] * 0.05
        packets = [packet for _ in range(8) for packet in self._encode(samples)]
        self._data, self._packets = bytes(packets[-1]), 0  # a late one, when the encoder has settled

    def _encode(self, samples: Any) -> Sequence[Any]:
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = _SOUND_RATE
        packets: Sequence[Any] = self._stream.encode(frame)
        return packets

    def write_until(self, seconds: float) -> None:
        while self._packets * _SOUND_FRAME < seconds * _SOUND_RATE:
            packet = av.Packet(self._data)
            packet.stream, packet.time_base = self._stream, Fraction(1, _SOUND_RATE)
            packet.pts = packet.dts = self._packets * _SOUND_FRAME
            packet.duration = _SOUND_FRAME
            self._container.mux(packet)
            self._packets += 1
