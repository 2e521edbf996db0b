"""Writes the curves into docs/evaluation.md: python docs/evaluation_curves.py NEEDLE_FOLDER FRAMES_FOLDER

Both are folders of `keye eval curve`; the charts are copied and the figures written from their `curve.json`. Without
folders only the table of known faults is written.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keye.evals.faults import FAULTS

DOCS = Path(__file__).parent
PAGE = DOCS / "evaluation.md"
#: For each task: its chart, the name of the copy, and what it shows.
IMAGES = {
    "needle_video": (
        "needle_video-grid.svg",
        "needle-video.svg",
        "share of needles found, by depth and length of the video",
    ),
    "frame_groups": ("frame_groups-frames.svg", "frame-groups.svg", "accuracy and group score over frames"),
}


def fault_rows() -> str:
    """The table's rows, tasks in alphabetical order."""
    return "".join(f"| `{task}` | {fault} |\n" for task, fault in sorted(FAULTS.items()))


def needle_lines(curve: dict[str, Any]) -> Iterable[str]:
    """Needles by the length of the video, in the order of lengths."""
    (point,) = curve["points"]
    accuracy = point["measures"]["accuracy"]
    by_length = sorted(point["parts"]["frames"].items(), key=lambda part: int(part[0]))
    yield f"`needle_video`: {words(accuracy)} of {point['items']} needles found, {point['prompt_tokens']:,.0f} prompt "
    yield "tokens on average. By frames of the video: "
    yield ", ".join(f"{frames}: {value:.0f} %" for frames, value in by_length) + ". "
    yield "By question: " + ", ".join(f"{name} {value:.0f} %" for name, value in point["parts"]["question"].items())
    yield ".\n\n"


def frame_lines(curve: dict[str, Any]) -> Iterable[str]:
    """A row for each point, then the pairs."""
    yield "| frames at most | attention | accuracy | Non-Lin | prompt tokens |\n|---|---|---|---|---|\n"
    for point in curve["points"]:
        measures = point["measures"]
        yield f"| {point['frames']} | {point['attention']} | {words(measures['accuracy'])} | "
        yield f"{words(measures['Non-Lin'])} | {point['prompt_tokens']:,.0f} |\n"
    yield "\n| frames at most | sparse minus dense, points | equal replies | verdict |\n|---|---|---|---|\n"
    for pair in curve["lossless"]:
        figures = pair["scorers"]["strict"]
        low, high = figures["interval"] or (float("nan"), float("nan"))
        yield f"| {pair['frames']} | {figures['difference']:+.1f} [{low:+.1f}, {high:+.1f}] | "
        yield f"{100 * pair['same_replies']:.0f} % of {pair['items']} | {pair['verdict']} |\n"


def words(measure: dict[str, Any]) -> str:
    """A value with its interval."""
    interval = measure["interval"]
    return f"{measure['value']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def replace_block(text: str, name: str, lines: str) -> str:
    """The page with other lines between the marks of a block."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", lambda m: m[1] + lines + m[2], text, flags=re.DOTALL
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders of keye eval curve")
    text, blocks = PAGE.read_text(encoding="utf-8"), list[str]()
    for folder in parser.parse_args(arguments).folders:
        curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
        name, image, shows = IMAGES[curve["task"]]
        shutil.copyfile(folder / name, DOCS / "images" / image)
        lines = needle_lines(curve) if curve["task"] == "needle_video" else frame_lines(curve)
        blocks.append(f"![{shows}](images/{image})\n\n" + "".join(lines))
    text = replace_block(text, "faults", fault_rows())
    if blocks:
        text = replace_block(text, "curves", "".join(blocks))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
