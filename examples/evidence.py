"""Which frames an answer rests on, in numbers and as a picture: python examples/evidence.py [PICTURE]

Needs keye alone, no extra.
"""

import sys
from pathlib import Path

import keye
from keye.sessions.pictures import draw_evidence

DEMO = Path(keye.__path__[0]) / "assets" / "demo.mp4"


def main(target: Path = Path("evidence.png")) -> None:
    question = "when is the red circle visible?"
    answer = keye.load("nano").ask(DEMO, question, evidence=True)
    assert answer.evidence is not None
    for medium in answer.evidence.media:
        for frame in medium.top():
            print(f"{medium.name} at {medium.times[frame]:.1f} s: {medium.lifts[frame]:.1f} times an even share")
    draw_evidence(answer.evidence, question, answer.text, answer.intervals).save(target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
