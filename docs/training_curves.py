"""Draws a training run from its log: python docs/training_curves.py LOG... [--output docs/images/nano-training.svg]

Panels over the steps of all stages, one after another: the loss of answers, the recall of the keys that the indexers
choose (where it was measured), the share of right answers while training at each number of frames, and that of tasks
which stay at chance without a helper loss of their own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

IMAGE = Path(__file__).parent / "images" / "nano-training.svg"
WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 860, 150, 56, 150, 34, 34
COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666")
#: Every point is the mean of so many records of the log.
SMOOTH = 5
#: Numbers of frames that get a line of their own.
FRAMES = (8, 16, 32, 64, 128)
#: Tasks that stay at chance without help; shown at 8 and 16 frames together.
HELPED = ("place", "direction", "size", "times", "cut_time")
#: Figures of the form task/frames that are no answers.
NOT_ANSWERS = ("kl", "recall")

Line = list[tuple[float, float]]


def read_log(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of runs that went on from one another, with `at`, the steps of all of them so far."""
    records, before, stage, last = [], 0, None, 0
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["stage"] != stage or record["step"] < last:
                before, stage = before + last, record["stage"]
            last = record["step"]
            records.append({**record, "at": before + last})
    return records


def lines_of(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Line]]:
    """The lines of each panel."""
    panels: dict[str, dict[str, Line]] = {
        name: defaultdict(list)
        for name in ("loss of answers", "recall of keys", "right answers", "right answers to some tasks")
    }
    for record in records:
        if (loss := record.get("loss")) is not None and any("/" in key for key in record):
            panels["loss of answers"]["loss"].append((record["at"], loss))
        answers: dict[int, list[float]] = defaultdict(list)
        for key, value in record.items():
            if value is None or not (match := re.fullmatch(r"([a-z_]+)/(\d+)", key)):
                continue
            frames = int(match[2])
            if match[1] == "recall" and frames in FRAMES:
                panels["recall of keys"][f"{frames} frames"].append((record["at"], value))
            elif match[1] not in NOT_ANSWERS and frames in FRAMES:
                answers[frames].append(value)
        for task in HELPED:
            if values := [record[key] for key in (f"{task}/8", f"{task}/16") if record.get(key) is not None]:
                panels["right answers to some tasks"][task].append((record["at"], sum(values) / len(values)))
        for frames, values in answers.items():
            panels["right answers"][f"{frames} frames"].append((record["at"], sum(values) / len(values)))
    return {
        name: {label: smooth(line) for label, line in sorted(lines.items(), key=lambda item: _number(item[0]))}
        for name, lines in panels.items() if lines
    }  # fmt: skip


def _number(label: str) -> int:
    return int(label.split()[0]) if label[0].isdigit() else 0


def smooth(line: Line) -> Line:
    """Means of `SMOOTH` points each."""
    parts = [line[start : start + SMOOTH] for start in range(0, len(line), SMOOTH)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def draw(records: Sequence[dict[str, Any]]) -> str:
    """The picture as SVG."""
    panels, end = lines_of(records), max(record["at"] for record in records)
    height = TOP + len(panels) * (PANEL + GAP)
    begins = {record["stage"]: record["at"] for record in reversed(records)}
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
           f'font-size="11"><rect width="100%" height="100%" fill="white"/>']  # fmt: skip

    def across(at: float) -> float:
        return LEFT + at / end * (WIDTH - LEFT - RIGHT)

    for stage, at in begins.items():
        x = across(at)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - GAP}" stroke="#ddd"/>')
        out.append(f'<text x="{x + 2:.1f}" y="{TOP - 8}" font-size="9" fill="#555">{escape(stage)}</text>')
    for number, (name, lines) in enumerate(panels.items()):
        top = TOP + number * (PANEL + GAP)
        high = 1.0 if name != "loss of answers" else max(y for line in lines.values() for _, y in line) * 1.05
        out.append(f'<text x="{LEFT}" y="{top + 12}" font-weight="bold">{name}</text>')
        for share in (0.0, 0.5, 1.0):
            y = top + PANEL * (1 - share)
            out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ccc"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{high * share:.2f}</text>')
        for color, (label, line) in zip(COLORS, lines.items(), strict=False):
            points = " ".join(f"{across(x):.1f},{top + PANEL * (1 - min(y / high, 1)):.1f}" for x, y in line)
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>')
            y = top + 14 + 14 * list(lines).index(label)
            out.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y}" fill="{color}">{escape(label)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{height - GAP + 14}" text-anchor="end">{end} steps</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of a run, or of several that went on")
    parser.add_argument("--output", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    arguments.output.write_text(draw(read_log(arguments.logs)), encoding="utf-8")


if __name__ == "__main__":
    main()
