"""A video that is still going on, to which frames are appended as they come: python examples/live.py

A question is asked now and then. Needs keye alone, no extra.
"""

from keye import load
from keye.data.frameforge import make_clip, render


def main() -> None:
    clip = make_clip(11, frames=32, split="test", start=0.0, step=0.5)
    frames = render(clip)
    session = load("nano").live()
    for start in range(0, clip.frames, 8):
        session.append(frames[start : start + 8], clip.timestamps[start : start + 8])
        answer = session.ask(f"what objects are visible at {session.times[-1]:.1f} seconds?")
        print(f"{session.times[-1]:4.1f} s, {session.frames} frames, {session.tokens} tokens: {answer.text}")


if __name__ == "__main__":
    main()
