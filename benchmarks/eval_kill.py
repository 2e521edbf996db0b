"""`keye eval` while it is killed: has every item one record, and is the score the same?

    python -m benchmarks.eval_kill --items 2000 --kills 10

Runs a server in this process that answers letters, and the command `keye eval FILE.py:TASK --server` on invented items
about small files: once undisturbed, and once killed (SIGKILL) ten times at even shares of the items, started again each
time. Prints records, items without one (`missing`) or with more (`twice`), and whether both scores are the same. Exits
with 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from keye.evals.task import EvalItem, ItemScore, Task, TaskSettings

_VIDEOS = 40
_LETTERS = "ABCD"
#: Of an answer.
_SECONDS = 0.004


@dataclass(frozen=True, kw_only=True)
class LetterTask(Task):
    """Items in `items.jsonl`; the question says which letter is right, and which one will be answered."""

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        for line in (folder / "items.jsonl").read_text().splitlines():
            row = json.loads(line)
            content = (
                {"type": "image", "image": str(folder / row["image"])},
                {"type": "text", "text": row["question"]},
            )
            yield EvalItem(row["id"], row["image"], content, {"answer": row["answer"]})

    def score(self, document: Any, prediction: str) -> ItemScore:
        return ItemScore(float(prediction == document["answer"]), prediction)


TASK = LetterTask(name="kill_letters", title="Letters", measures="nothing", source="", licence="none", media="image")


class _Server(BaseHTTPRequestHandler):
    """Answers the letter in brackets at the end of a question, after a few milliseconds."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "letters"}]})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not content:  # the client was killed
            return
        text = json.loads(content)["messages"][-1]["content"][-1]["text"]
        time.sleep(_SECONDS)
        usage = {"prompt_tokens": 10, "completion_tokens": 1}
        self._send(200, {"choices": [{"message": {"content": text[-2]}}], "usage": usage, "model": "letters"})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


def write_data(folder: Path, items: int) -> None:
    """Small files, and questions about them; two of three will be answered right."""
    folder.mkdir()
    for number in range(_VIDEOS):
        (folder / f"{number}.png").write_bytes(b"not opened by this server")
    rows = []
    for number in range(items):
        gold = _LETTERS[number % 4]
        reply = gold if number % 3 else _LETTERS[(number + 1) % 4]
        rows.append(
            {"id": f"q{number}", "image": f"{number % _VIDEOS}.png", "answer": gold, "question": f"? [{reply}]"}
        )
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Run:
    """One output of the command."""

    def __init__(self, data: Path, output: Path, url: str) -> None:
        self.place = output / TASK.name
        self._command = [
            sys.executable, "-m", "keye", "eval", f"{Path(__file__)}:TASK", "--data", str(data), "-o", str(output),
            "--server", url, "--json",
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def records(self) -> int:
        path = self.place / "predictions.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def kill_at(self, records: int) -> bool:
        """Starts the command and kills it when so many records are there; whether it was still running."""
        process = self.start()
        while process.poll() is None and self.records() < records:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        return process.returncode < 0

    def end(self) -> tuple[int, dict[str, Any]]:
        """Lets the command come to its end: exit code and result."""
        process = self.start()
        text, _ = process.communicate()
        return process.returncode, json.loads(text)["results"][0]


def measure(items: int, kills: int, url: str, folder: Path) -> dict[str, Any]:
    write_data(folder / "data", items)
    _, plain = Run(folder / "data", folder / "plain", url).end()
    run, killed = Run(folder / "data", folder / "killed", url), 0
    for number in range(1, kills + 1):
        killed += run.kill_at(number * items // (kills + 1))
    code, result = run.end()
    lines = (run.place / "predictions.jsonl").read_text().splitlines()
    counts = Counter(json.loads(line)["id"] for line in lines)
    return {
        "items": items, "killed": killed, "records": len(lines), "missing": items - len(counts),
        "twice": sum(count > 1 for count in counts.values()), "exit": code,
        "same_score": result["scorers"] == plain["scorers"], "value": result["scorers"]["strict"]["value"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="keye-eval-kill-") as folder:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        figures = measure(arguments.items, arguments.kills, url, Path(folder))
    server.shutdown()
    print(json.dumps(figures))
    wrong = figures["missing"] or figures["twice"] or figures["records"] != arguments.items or not figures["same_score"]
    return int(bool(wrong))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
