"""A short film of drawn shapes in which something happens once, cheap to write and to search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import av

from keye.data.frameforge.render import render
from keye.data.frameforge.scene import Background, Clip, Scene, SceneObject
from keye.data.frameforge.words import BACKGROUNDS, COLORS

SIZE, RATE = (168, 96), 5
#: Name, first second, and the second of the first frame without it.
Event = tuple[str, float, float]
#: What the film of the tests shows; the red circle is what they look for.
EVENTS: tuple[Event, ...] = (
    ("red star", 4.0, 7.0), ("blue circle", 12.0, 15.0), ("red circle", 21.0, 23.0), ("blue star", 31.0, 34.0),
)  # fmt: skip


def write_short_film(path: Path, events: Sequence[Event] = EVENTS, seconds: float = 40.0) -> Path:
    """A film of `RATE` frames a second, each event one shape at a place of its own on a still background."""
    scale = min(math.sqrt(SIZE[0] * SIZE[1]) / 112, min(SIZE) / 84)
    canvas = SIZE[0] / scale, SIZE[1] / scale
    things = []
    for i, (name, start, end) in enumerate(events):
        color, shape = name.split()
        x, y = canvas[0] * (0.25 if i % 2 else 0.7), canvas[1] * 0.5
        frames = (round(start * RATE), round(end * RATE) - 1)
        things.append(SceneObject(color, shape, "big", 16.0, COLORS[color], (frames,), "static", (x, y, x, y)))
    times = tuple(round(i / RATE, 1) for i in range(round(seconds * RATE)))
    background = Background(0, "gray", BACKGROUNDS["gray"])
    clip = Clip(Scene(canvas, tuple(things), None, (background,), 3), times, SIZE, 0, "test", 1 / RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "g": "25"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for pixels in render(clip, SIZE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
