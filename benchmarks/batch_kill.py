"""`keye batch` while its processes are killed: is every item in the output, and once?

    python -m benchmarks.batch_kill --items 1000

Writes short FrameForge clips and a manifest of questions about them, and runs the command with engines in processes of
their own four times: undisturbed; with one worker killed (SIGKILL) when 30 % of the items are done; with half of them
killed then; with the whole command killed at 30 % and at 60 % and started again each time. With `--ray` the engines are
actors on a Ray cluster that this program starts. For each run: records, how many items have none (`missing`) or more
than one (`twice`), errors, answers that differ from those of the first run, seconds and their ratio to those of the
first run, workers that outlived their command for more than ten seconds.
Exits with 1 if an item is missing or there twice, or if a worker was left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from keye.data.frameforge import make_clip, questions, write_mp4

SIZE = (224, 224)


def write_manifest(folder: Path, items: int, videos: int) -> Path:
    """Clips of 16 frames and as many questions about each as are needed."""
    lines = []
    for seed in range(videos):
        clip = make_clip(seed, frames=16, objects=3, split="test", start=0.0, step=0.5)
        write_mp4(clip, folder / f"{seed}.mp4", SIZE)
        request = questions(clip, random.Random(seed), 16)
        for number in range(seed, items, videos):
            question = request[number // videos % len(request)].text
            lines.append({"id": f"q{number}", "video": f"{seed}.mp4", "question": question, "max_tokens": 12})
    random.Random(0).shuffle(lines)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Run:
    """One output, and the commands that write it. `pids` are the workers of the last command."""

    def __init__(self, manifest: Path, out: Path, options: Sequence[str]) -> None:
        self.out = out
        self._command = [sys.executable, "-m", "keye", "batch", str(manifest), "-o", str(out), *options]
        self.pids: list[int] = []

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for(self, process: subprocess.Popen[bytes], done: int) -> None:
        """Until so many records are there, or the command has ended."""
        while process.poll() is None and self.records() < done:
            time.sleep(0.02)
        self.pids = workers()

    def records(self) -> int:
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Lets it come to its end, which must be a good one."""
        _, events = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"keye batch failed: {events.decode(errors='replace')[-2000:]}")


def workers() -> list[int]:
    """Processes with an engine that belong to a batch of this user: children, or actors."""
    result = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
        except (OSError, NotADirectoryError):
            continue
        if b"keye.server.batch_engine" in command or b"ray::Engine" in command:
            result.append(int(folder.name))
    return sorted(result)


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def left(pids: Sequence[int], seconds: float = 10.0) -> int:
    """How many of these are still there after a while."""
    end = time.monotonic() + seconds
    while (alive := set(pids) & set(workers())) and time.monotonic() < end:
        time.sleep(0.05)
    return len(alive)


def disturb(run: Run, how: str, items: int) -> dict[str, Any]:
    """One batch from its beginning to its end, with what happens to it on the way."""
    begin = time.monotonic()
    process, killed, orphans = run.start(), 0, 0
    if how in ("worker", "half"):
        run.wait_for(process, round(0.3 * items))
        victims = run.pids[:1] if how == "worker" else run.pids[: len(run.pids) // 2]
        kill(victims)
        killed = len(victims)
    elif how == "driver":
        for share in (0.3, 0.6):
            run.wait_for(process, round(share * items))
            process.kill()
            process.communicate()
            orphans += left(run.pids)
            killed += 1
            process = run.start()
    run.end(process)
    return {"killed": killed, "left": orphans, "seconds": round(time.monotonic() - begin, 1)}


def outcome(out: Path, ids: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the output holds, and the texts in it by id."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    counts = Counter(record["id"] for record in records)
    texts = {record["id"]: record.get("text") for record in records}
    events = {
        "records": len(records), "missing": sum(item not in counts for item in ids),
        "twice": sum(count > 1 for count in counts.values()),
        "errors": sum(record["error"] is not None for record in records),
    }  # fmt: skip
    return events, texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--ray", action="store_true", help="engines are actors on a Ray cluster of this machine")
    value = parser.parse_args()
    options = ["--workers", str(value.workers), "--threads", "1", "--json"]
    if value.ray:
        import ray

        ray.init("local", num_cpus=value.workers, log_to_driver=False, include_dashboard=False)
        options += ["--ray", ray.get_runtime_context().gcs_address]
    result: dict[str, Any] = {"items": value.items, "videos": value.videos, "workers": value.workers, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        manifest = write_manifest(Path(name), value.items, value.videos)
        ids = [json.loads(line)["id"] for line in manifest.read_text().splitlines()]
        first: dict[str, Any] = {}
        for how in ("undisturbed", "worker", "half", "driver"):
            run = Run(manifest, Path(name) / f"{how}.jsonl", options)
            events = disturb(run, how, value.items)
            holds, texts = outcome(run.out, ids)
            first = first or {"texts": texts, "seconds": events["seconds"]}
            result["runs"][how] = {
                **holds, "different": sum(text != first["texts"].get(item) for item, text in texts.items()), **events,
                "ratio": round(events["seconds"] / first["seconds"], 2),
            }  # fmt: skip
    print(json.dumps(result))
    return int(any(run["missing"] or run["twice"] or run["left"] for run in result["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
