"""Clips to files: .mp4 with exact timestamps, and a data set with a JSON-lines manifest."""

import json
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye.data.frameforge.questions import Question, questions
from keye.data.frameforge.render import Pixels, render
from keye.data.frameforge.scene import Clip, make_clip, stream
from keye.errors import KeyeError
from keye.files import complete_file

MANIFEST = "manifest.jsonl"
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


def write_dataset(
    folder: str | os.PathLike[str],
    *,
    count: int,
    frames: int,
    objects: int,
    split: str,
    seed: int,
    size: tuple[int, int] = (448, 448),
    questions_per_clip: int = 8,
    tasks: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes clip-000000.mp4 ... and `manifest.jsonl` into `folder`, and returns the path of the manifest.

    The clips are those of `make_clip(seed + index)`. A line of the manifest holds file, seed, split, size, start, step
    and timestamps in seconds, and questions with task, text, answer and intervals. `progress(done, total)` is called
    after each clip.
    """
    if count < 1:
        raise KeyeError(f"count is {count}; write at least 1 clip")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        clip = make_clip(seed + index, frames=frames, objects=objects, split=split, size=size)
        name = f"clip-{index:06d}.mp4"
        write_mp4(clip, target / name, size)
        chosen = questions(clip, stream(split, clip.seed, "questions"), questions_per_clip, tasks)
        lines.append(json.dumps(_entry(name, clip, chosen)))
        if progress:
            progress(index + 1, count)
    with complete_file(target / MANIFEST) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target / MANIFEST


def _entry(name: str, clip: Clip, chosen: Sequence[Question]) -> dict[str, Any]:
    return {
        "file": name,
        "seed": clip.seed,
        "split": clip.split,
        "size": list(clip.size),
        "start": clip.timestamps[0],
        "step": clip.step,
        "timestamps": list(clip.timestamps),
        "questions": [
            {"task": question.task, "text": question.text, "answer": question.answer, "intervals": question.intervals}
            for question in chosen
        ],
    }


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
