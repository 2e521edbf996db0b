"""Grounding tasks through a search: the event is what is searched, the likeliest moment is the reply."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keye.errors import KeyeError
from keye.evals.run import ModelFacts, RunOptions, run_task
from keye.evals.search import FindWorker, as_search
from keye.evals.settings import RunSettings
from keye.evals.task import EvalItem, TaskSettings, find_task
from keye.evals.tasks.grounding import Grounding
from keye.moments import Coverage, FindResult, Moment


@dataclass(frozen=True, kw_only=True)
class Events(Grounding):
    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        (folder / "a.mp4").touch()
        video = {"type": "video", "video": str(folder / "a.mp4"), "fps": 2.0}
        for name in ("jump", "fall", "never", "broken"):
            text = {"type": "text", "text": f"When does this happen: '{name}'? Reply with a span."}
            yield EvalItem(name, "a", (video, text), {"query": name, "span": [10.0, 20.0]})


class FakeKeye:
    """Finds a jump surely, a fall less surely, nothing else."""

    def __init__(self) -> None:
        self.searches: list[tuple[str, str, dict[str, Any]]] = []

    def find(self, video: str, event: str, *, media_options: dict[str, Any]) -> FindResult:
        self.searches.append((Path(video).name, event, media_options))
        if event == "broken":
            raise KeyeError("the video is broken")
        moment = Moment("1", 1, 10.0, 20.0 if event == "jump" else 15.0, 0.9)
        coverage = Coverage(60.0, (), (), 1, 30, 1000, 123)
        return FindResult(
            event, video, "fake", (moment,) if event == "jump" else (), (moment,) if event == "fall" else (), 0.5, 0.7,
            coverage, (), {},
        )  # fmt: skip


def task() -> Events:
    timelens = find_task("timelens_charades")
    values = {name: getattr(timelens, name) for name in timelens.__dataclass_fields__}
    return Events(**{**values, "official": ()})


def test_events_are_searched_and_scored_strictly(tmp_path: Path) -> None:
    model: Any = FakeKeye()
    options = RunOptions(lambda: [FindWorker(lambda: model)], ModelFacts("fake", "w"))
    (tmp_path / "data").mkdir()
    result = run_task(as_search(task()), tmp_path / "data", RunSettings(), tmp_path / "out", options)
    assert [(video, event) for video, event, _ in model.searches if event != "broken"] == [
        ("a.mp4", "jump"), ("a.mp4", "fall"), ("a.mp4", "never"),
    ]  # fmt: skip
    assert model.searches[0][2] == {"fps": 2.0}
    strict = result["scorers"]["strict"]
    assert strict["lower_bound"] == pytest.approx(100 * (1 + 0.5 + 0 + 0) / 4) and strict["value"] is None
    assert result["shares"]["failed"] == 0.25 and "broken" in result["errors"][0]["message"]
    assert result["tokens"]["prompt"]["max"] == 123


def test_a_task_without_events_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="needle_video does not ask when"):
        list(as_search(find_task("needle_video")).read(tmp_path, TaskSettings()))


def test_the_worker_loads_when_it_starts() -> None:
    loads = []
    worker = FindWorker(lambda: loads.append(1))  # type: ignore[arg-type,return-value]
    asyncio.run(worker.start())
    assert loads == [1]
