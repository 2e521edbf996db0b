"""Time of the check of a set of 100,000 conversations with pictures and videos, and whether it finds every planted
fault with its file and line.

    python benchmarks/check_data.py [--rows 100000] [--media 200] [--json FILE]

The files lie in a temporary folder: 4,000 PNG pictures and 60 H.264 videos of 4 s, named over and over by the rows.
Faults are planted in 40 rows; with `--media all` 6 more rows name media that cannot be decoded. Wall time counts
everything that `keye finetune --check` does with data: opening, reading, converting and checking all rows, looking up
every path, and opening the media of the drawn rows in confined workers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from keye.data.check import check_sets
from keye.data.samples import Skip
from keye.data.sources import DataSet

PICTURES, VIDEOS, FAULTS, BROKEN = 4000, 60, 40, 6


def write_media(folder: Path) -> None:
    """Pictures and videos, the last few of each cut in the middle."""
    noise = np.random.default_rng(0)
    for number in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 255, (48, 64, 3), np.uint8)).save(file, "PNG")
        data = file.getvalue()
        (folder / f"{number}.png").write_bytes(data if number < PICTURES - BROKEN // 2 else data[: len(data) // 3])
    with av.open(str(folder / "first.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for _ in range(100):
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, (96, 128, 3), np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = (folder / "first.mp4").read_bytes()
    for number in range(VIDEOS):
        (folder / f"{number}.mp4").write_bytes(data if number < VIDEOS - BROKEN // 2 else data[: 1 << 12])


def write_rows(path: Path, count: int, *, broken: bool) -> dict[int, str]:
    """Writes the rows, and returns the lines of planted faults with a word of the reason. With `broken` some rows name
    media that cannot be decoded."""
    draw = random.Random(0)
    places = draw.sample(range(count), FAULTS + BROKEN)
    faulty, undecodable = sorted(places[:FAULTS]), places[FAULTS:] if broken else []
    reasons: dict[int, str] = {}
    with path.open("w") as file:
        for number in range(count):
            row = make_row(number, draw)
            if number in undecodable:
                row, reasons[number + 1] = (
                    break_medium(row, undecodable.index(number)),
                    "damaged|cannot|ends|end of|broken",
                )
            text = json.dumps(row)
            if number in faulty:
                text, reasons[number + 1] = break_row(row, faulty.index(number) % 8)
            file.write(text + "\n")
    return reasons


def make_row(number: int, draw: random.Random) -> dict[str, Any]:
    """A conversation of two rounds about a picture, or every tenth about a video."""
    words = " ".join(draw.choices("the a red blue ball car runs falls left of behind two three".split(), k=40))
    kind, ending, count = ("video", "mp4", VIDEOS) if number % 10 == 0 else ("image", "png", PICTURES)
    name = f"{draw.randrange(count - BROKEN // 2)}.{ending}"
    return {
        "id": number,
        "messages": [
            {"role": "user", "content": f"<{kind}>\nWhat is in it? {words}"}, {"role": "assistant", "content": words},
            {"role": "user", "content": "And what is not?"}, {"role": "assistant", "content": f"Nothing. {words}"},
        ],
        f"{kind}s": [name], "max_pixels": 200704,
    }  # fmt: skip


def break_medium(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with a medium that was cut off."""
    kind, ending, count = ("video", "mp4", VIDEOS) if number % 2 else ("image", "png", PICTURES)
    messages = [{**row["messages"][0], "content": f"<{kind}>What?"}, *row["messages"][1:]]
    return {"messages": messages, f"{kind}s": [f"{count - 1 - number // 2}.{ending}"]}


def break_row(row: dict[str, Any], kind: int) -> tuple[str, str]:
    """The row with a fault, and a word of the sentence that has to be said of it."""
    messages = row["messages"]
    if kind == 0:
        return json.dumps(row)[:-20], "not JSON"
    if kind == 1:
        return json.dumps({**row, "messages": []}), "empty"
    if kind == 2:
        return json.dumps({**row, "messages": [{**messages[0], "role": "robot"}, *messages[1:]]}), "unknown role"
    if kind == 3:
        return json.dumps({**row, "images": ["missing.png"], "videos": []}), "does not exist|mark"
    if kind == 4:
        return json.dumps({**row, "messages": messages[:-1]}), "last message"
    if kind == 5:
        return json.dumps({**row, "messages": [*messages[:-1], {"role": "assistant", "content": ""}]}), "empty reply"
    if kind == 6:
        return json.dumps({**row, "messages": [{**messages[0], "content": "<image><image>"}, *messages[1:]]}), "mark"
    return json.dumps({**row, "max_pixels": "many"}), "max_pixels"


def is_reported(line: int, reason: str, faults: tuple[Skip, ...]) -> bool:
    return any(skip.place.line == line and any(word in skip.reason for word in reason.split("|")) for skip in faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--media", default="200", help="rows whose media are opened, or all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    media = None if arguments.media == "all" else int(arguments.media)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_media(folder)
        reasons = write_rows(folder / "rows.jsonl", arguments.rows, broken=media is None)
        begin, cpu = time.perf_counter(), time.process_time()
        check = check_sets([DataSet(folder / "rows.jsonl")], seed=0, media=media)
        seconds, own = time.perf_counter() - begin, time.process_time() - cpu
    missed = {line: reason for line, reason in reasons.items() if not is_reported(line, reason, check.faults)}
    figures = {
        "rows": check.rows, "media_opened": check.media_checked, "seconds": round(seconds, 2),
        "own_cpu_seconds": round(own, 2), "faults_planted": len(reasons), "faults_missed": len(missed),
        "other_faults": len(check.faults) - len(reasons) + len(missed), "cores": os.cpu_count(),
    }  # fmt: skip
    print(json.dumps(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if missed:
        raise SystemExit(f"not reported: {missed}")


if __name__ == "__main__":
    main()
