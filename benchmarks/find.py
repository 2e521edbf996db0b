"""Films to search in, with known answers, as files.

    python -m benchmarks.find make -o film.mp4 [--minutes 120] [--seed 0] [--split test] [--needles 13] [--event 2]
        [--sound]

writes a FrameForge film of 640x360 at 12.5 frames/s and beside it `film.json`: when each needle is seen, which names
are never shown, near misses and cuts, all in seconds. Two hours take about 40 CPU seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from keye.data.frameforge import plan_film, write_film


def make(arguments: argparse.Namespace) -> None:
    """Writes one film and its gold answers."""
    film = plan_film(
        arguments.seed, minutes=arguments.minutes, split=arguments.split, needles=arguments.needles,
        event=arguments.event, near_misses=arguments.near_misses,
    )  # fmt: skip
    write_film(film, arguments.output, sound=arguments.sound)
    arguments.output.with_suffix(".json").write_text(json.dumps(film.to_dict(), indent=2) + "\n")
    print(json.dumps({"needles": [[event.name, event.start, event.end] for event in film.needles],
                      "absent": film.absent[:5], "cuts": len(film.cuts)}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    maker = commands.add_parser("make", help="write one film and its gold answers")
    maker.add_argument("-o", "--output", type=Path, required=True)
    maker.add_argument("--minutes", type=float, default=120.0)
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--split", default="test", choices=("train", "test", "unseen"))
    maker.add_argument("--needles", type=int, default=13)
    maker.add_argument("--event", type=float, default=2.0, help="seconds that a needle is seen")
    maker.add_argument("--near-misses", type=float, default=1.0, help="other events a minute")
    maker.add_argument("--sound", action="store_true", help="with a quiet tone")
    maker.set_defaults(run=make)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
