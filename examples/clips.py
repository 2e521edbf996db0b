"""Finds an event in a video and cuts it out: python examples/clips.py [VIDEO] [EVENT] [FOLDER]

Needs keye alone, no extra.
"""

from __future__ import annotations

import sys
from pathlib import Path

import keye
from keye.hub import asset
from keye.media.clips import cut_clips
from keye.media.source.fetch import fetch_source


def main(video: str, event: str, folder: str) -> None:
    """Prints the paths of the clips."""
    answer = keye.load("nano").ground(video, event)
    if not answer.intervals:
        print(f"not found: {event}")
    for path in cut_clips(fetch_source(video), answer.intervals, Path(folder)):
        print(path)


if __name__ == "__main__":
    defaults = [str(asset("demo.mp4")), "the red circle", "clips"]
    main(*(sys.argv[1:] + defaults[len(sys.argv) - 1 :])[:3])
