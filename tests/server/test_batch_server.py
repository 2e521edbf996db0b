"""`keye batch --server`: files are sent to a server that knows nothing of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from keye.batch.journal import Journal
from keye.batch.manifest import read_manifest
from keye.batch.run import Batch
from keye.batch.workers import ServerWorker
from tests.support.serving import Running


def test_questions_about_a_file_over_http(running: Running, video: Path, tmp_path: Path) -> None:
    lines = [{"id": name, "media": video.name, "question": "what?", "fps": 1, "max_tokens": 2} for name in "ab"]
    lines.append({"id": "c", "video": video.name, "question": "what?", "temperature": 9})
    (video.parent / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = read_manifest(video.parent / "questions.jsonl")
    worker = ServerWorker(f"{running.url}/v1", model=None, key=None, slots=2, tries=1)
    with Journal(tmp_path / "out.jsonl") as journal:
        report = asyncio.run(Batch([worker], journal).run(items))
    assert (report.ok, report.errors) == (2, 1)
    result = {record["id"]: record for record in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert result["a"]["usage"]["media"][0]["timestamps"] == [0.0, 1.0, 2.5, 3.5]
    assert result["c"]["error"]["message"].startswith("temperature: ")
