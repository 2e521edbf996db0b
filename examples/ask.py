"""Asks about a video and prints the answer while it is written: python examples/ask.py [VIDEO] [QUESTION]

Needs keye alone, no extra.
"""

from __future__ import annotations

import sys

import keye
from keye.hub import asset


def main(video: str, question: str) -> None:
    """Streams the answer, then shows what else an answer holds."""
    model = keye.load("nano")
    stream = model.stream_ask(video, question)
    for piece in stream:
        print(piece, end="", flush=True)
    answer = stream.finish()
    print(f"\nintervals in seconds: {answer.intervals}")
    print(f"{answer.usage.media_tokens} of {answer.usage.prompt_tokens} prompt tokens are visual")
    print(f"frames at {answer.plan[0]['timestamps']}")


if __name__ == "__main__":
    defaults = [str(asset("demo.mp4")), "when is the cyan triangle visible?"]
    main(*(sys.argv[1:] + defaults[len(sys.argv) - 1 :])[:2])
