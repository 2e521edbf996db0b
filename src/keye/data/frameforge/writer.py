"""Clips to .mp4 files with exact timestamps."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye.data.frameforge.render import Pixels, render
from keye.data.frameforge.scene import Clip
from keye.errors import KeyeError
from keye.files import complete_file

_MILLISECOND = Fraction(1, 1000)


def write_mp4(clip: Clip, path: str | os.PathLike[str], size: tuple[int, int] = (448, 448)) -> None:
    """Writes `clip` as H.264 video, frame i shown at `clip.timestamps[i]` seconds of the file's own clock.

    When the clip begins after 0, a lead-in frame with the bare background comes first, at 0. The file appears at `path`
    only when it is complete. KeyeError for odd sizes or another aspect ratio than the clip's.
    """
    if size[0] % 2 or size[1] % 2:
        raise KeyeError(f"size is {size[0]}x{size[1]}; video needs even sides")
    frames, times = render(clip, size), [round(1000 * seconds) for seconds in clip.timestamps]
    if times[0] > 0:
        lead_in = np.empty_like(frames[:1])
        lead_in[:] = clip.scene.backgrounds[0].rgb
        frames, times = np.concatenate([lead_in, frames]), [0, *times]
    ends = [*times[1:], times[-1] + round(1000 * clip.step)]
    durations = {start: end - start for start, end in zip(times, ends, strict=True)}
    with complete_file(Path(path)) as draft:
        _encode(draft, frames, durations, round(1 / clip.step) or 1)


def _encode(path: Path, frames: Pixels, durations: dict[int, int], rate: int) -> None:
    # No B-frames: packets come in the order of time, and their decoding clock starts at 0 without an edit list.
    options = {"crf": "20", "preset": "veryfast", "bf": "0"}
    with av.open(str(path), "w", format="mp4", options={"video_track_timescale": "1000"}) as container:
        encoder = container.add_stream("libx264", rate=rate, options=options)
        encoder.height, encoder.width = frames.shape[1:3]
        encoder.pix_fmt = "yuv420p"
        encoder.codec_context.time_base = _MILLISECOND
        encoder.codec_context.thread_count = 1
        for pixels, time in zip(frames, durations, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = time, _MILLISECOND
            _mux(container, encoder.encode(picture), durations)
        _mux(container, encoder.encode(None), durations)


def _mux(container: Any, packets: Sequence[Any], durations: dict[int, int]) -> None:
    for packet in packets:
        assert packet.time_base == _MILLISECOND, "libx264 keeps the clock of the frames"
        packet.duration = durations[packet.pts]
        container.mux(packet)
