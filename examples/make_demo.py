"""Makes the bundled demo video again: python examples/make_demo.py [PATH]

Needs keye alone, no extra. The video is a clip of FrameForge, whose scene follows from its seed: 32 frames in
16 seconds, in which a red circle rises from 3.0 to 8.5 seconds while other shapes and the number 95 come and go.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from keye.data.frameforge import make_clip, questions, write_mp4

SEED = 1978
SIZE = (448, 448)
TARGET = Path(__file__).parents[1] / "src/keye/assets/demo.mp4"


def main(path: Path = TARGET) -> None:
    """Writes the video to `path` and prints what can be asked about it."""
    clip = make_clip(SEED, frames=32, objects=4, split="test", size=SIZE, start=0.0, step=0.5)
    write_mp4(clip, path, SIZE)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    for question in questions(clip, random.Random(0), 8):
        print(f"  {question.text}  {question.answer}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
