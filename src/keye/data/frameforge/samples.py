"""FrameForge as a data set of files: clips as .mp4, and questions with their reasoning and answers as JSON lines, which
`keye train` and `keye finetune` read as they read everybody's data.

    python -m keye.data.frameforge.samples OUT_DIR --clips 200 --frames 16 32 64 --modes think no_think
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from keye.data.frameforge.questions import TASKS, Question, questions
from keye.data.frameforge.scene import SPLITS, Clip, make_clip, stream
from keye.data.frameforge.traces import trace
from keye.data.frameforge.writer import write_mp4
from keye.data.samples import MODES
from keye.errors import KeyeError
from keye.files import complete_file

#: File of the rows, beside the folder of the clips.
ROWS_FILE: Final = "samples.jsonl"
_MOST_CLIPS: Final = 1_000_000


def write_samples(
    folder: Path, *, clips: int, frames: Sequence[int] = (16,), questions_each: int = 4, tasks: Sequence[str] = (),
    modes: Sequence[str] = ("no_think",), split: str = "train", seed: int = 0, size: tuple[int, int] = (224, 224),
) -> Path:  # fmt: skip
    """Writes a data set into `folder` and returns its file of rows; the same arguments write the same rows.

    Each clip has one of the numbers of `frames`, is written at `size` pixels (width, height), and up to
    `questions_each` questions of the `tasks` (all by default) are asked about it. A row has one of the `modes` in turn:
    in mode no_think its reply is the answer, in the others the reasoning in `<think>` comes first where the task has
    some; a question without reasoning is never asked in mode think. KeyeError for an unknown mode, task or split and
    for clips that cannot be made.
    """
    if not 0 < clips <= _MOST_CLIPS:
        raise KeyeError(f"clips is {clips}; choose 1 to {_MOST_CLIPS:,}")
    if unknown := sorted(set(modes) - {"think", "no_think", "auto"}) or ([] if modes else ["nothing"]):
        raise KeyeError(f"modes holds {unknown[0]!r}; choose think, no_think or auto")
    if not frames:
        raise KeyeError("frames is empty; give at least one number of frames")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rng, count = stream(split, seed, "samples"), 0
    with complete_file(folder / ROWS_FILE) as draft, draft.open("w", encoding="utf-8") as file:
        for number in range(clips):
            clip = make_clip(rng.getrandbits(60), frames=rng.choice(frames), split=split)
            chosen = questions(clip, rng, questions_each, tasks=tasks or None)
            if not chosen:
                continue
            path = Path("clips") / f"{number:06d}.mp4"
            write_mp4(clip, folder / path, size)
            for row in _rows(clip, chosen, path, modes, count):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += len(chosen)
        if not count:
            raise KeyeError("no question fits these clips; choose other tasks, or more clips")
    return folder / ROWS_FILE


def _rows(
    clip: Clip, chosen: Sequence[Question], path: Path, modes: Sequence[str], count: int
) -> Iterator[dict[str, Any]]:
    """The rows of a clip, the first of which has the number `count`."""
    video = {"type": "video", "video": path.as_posix(), "nframes": clip.frames}
    if clip.timestamps[0] > 0:
        video["video_start"] = clip.timestamps[0]  # a lead-in frame comes before
    for number, question in enumerate(chosen, count):
        mode, reasoning = modes[number % len(modes)], trace(clip, question)
        if mode == "think" and not reasoning:
            mode = "no_think"
        reply = question.answer
        if reasoning and mode != "no_think":
            reply = f"<think>\n{reasoning}\n</think>\n\n{reply}"
        content = [video, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
        yield {"messages": messages, "mode": mode, "task": question.task}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a data set as the options say."""
    parser = argparse.ArgumentParser(
        prog="python -m keye.data.frameforge.samples", description="FrameForge clips and questions as training data."
    )
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--frames", type=int, nargs="+", default=[16], help="frames of a clip, drawn evenly from these")
    parser.add_argument("--questions", type=int, default=4, help="most questions about a clip")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[])
    parser.add_argument("--modes", nargs="+", choices=MODES[:3], default=["no_think"])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        path = write_samples(
            options.folder, clips=options.clips, frames=options.frames, questions_each=options.questions,
            tasks=options.tasks, modes=options.modes, split=options.split, seed=options.seed,
        )  # fmt: skip
    except KeyeError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
