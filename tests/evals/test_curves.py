"""Curves over frames and attention: every point is a run, pairs are compared by item, charts follow from figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keye.batch.manifest import Item
from keye.batch.workers import Answer
from keye.errors import KeyeError
from keye.evals.curves import Grid, judge_lossless, run_curve
from keye.evals.run import ModelFacts, RunOptions
from keye.evals.settings import RunSettings
from keye.evals.task import EvalItem, ItemScore, Task, TaskSettings
from keye.scoring.official.registry import Document


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Twenty numbers about ten videos; the fake model says whether each is even, the more frames the better."""

    name: str = "parity"
    title: str = "Parity"
    measures: str = "whether numbers are even"
    source: str = "own"
    licence: str = "own"
    media: Any = "video"

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        (folder / "v.mp4").touch()
        for number in range(20):
            parts = ({"type": "video", "video": str(folder / "v.mp4")}, {"type": "text", "text": str(number)})
            labels = {"x x y": f"{number % 2} x {number // 10}"}
            yield EvalItem(f"n{number}", f"v{number // 2}", parts, {"answer": str(number % 2)}, labels)

    def score(self, document: Document, prediction: str) -> ItemScore:
        return ItemScore(float(prediction == document["answer"]), prediction)


class FakeModel:
    """Right about numbers below its frames, and about none above; dense attention knows two more."""

    name, slots, model = "fake", 1, "fake"

    def __init__(self) -> None:
        self.requests = 0

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, item: Item) -> Answer:
        self.requests += 1
        video, text = item.body["messages"][-1]["content"]
        knows = video.get("max_frames", 20) + (2 if item.body.get("attention") == "dense" else 0)
        number = int(text["text"])
        reply = str(number % 2) if number < knows else "?"
        choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        return Answer(200, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}})


def run(folder: Path, grid: Grid, model: FakeModel | None = None) -> dict[str, Any]:
    model = model or FakeModel()
    options = RunOptions(lambda: [model], ModelFacts("fake", "w"))
    data = folder / "data"
    data.mkdir(exist_ok=True)
    return run_curve(Parity(), data, grid, RunSettings(), folder / "out", options)


def values_of(curve: Mapping[str, Any]) -> dict[tuple[Any, Any], float]:
    return {(point["attention"], point["frames"]): point["measures"]["accuracy"]["value"] for point in curve["points"]}


def test_scores_rise_with_frames_and_everything_is_written(tmp_path: Path) -> None:
    curve = run(tmp_path, Grid((10, 5)))
    assert values_of(curve) == {(None, 5): 25.0, (None, 10): 50.0} and curve["lossless"] == []
    out = tmp_path / "out"
    assert json.loads((out / "curve.json").read_text()) == curve
    html = (out / "report.html").read_text()
    assert html.count("Parity: score over frames") >= 1 and "<svg" in html and "https://" not in html
    for name in ("parity-frames.svg", "parity-grid.svg"):
        ElementTree.parse(out / name)


def test_a_finished_point_is_read_and_not_asked_again(tmp_path: Path) -> None:
    model = FakeModel()
    first = run(tmp_path, Grid((5,)), model)
    assert model.requests == 20
    again = run(tmp_path, Grid((5, 10)), model)
    assert model.requests == 40 and again["points"][0] == first["points"][0]


def test_both_kinds_of_attention_are_compared_in_pairs(tmp_path: Path) -> None:
    curve = run(tmp_path, Grid((10,), ("sparse", "dense")))
    assert values_of(curve) == {("sparse", 10): 50.0, ("dense", 10): 60.0}
    (pair,) = curve["lossless"]
    figures = pair["scorers"]["strict"]
    assert figures["difference"] == pytest.approx(-10) and pair["same_replies"] == pytest.approx(0.9)
    assert figures["first_better"] == 2 and figures["second_better"] == 0
    assert "sparse against dense attention" in (tmp_path / "out" / "report.html").read_text()
    assert pair["verdict"] == "undecided"  # one video of ten decides it


def test_a_wide_margin_accepts_the_same_difference(tmp_path: Path) -> None:
    (pair,) = run(tmp_path, Grid((10,), ("sparse", "dense"), margin=40))["lossless"]
    assert pair["verdict"] == "lossless"


@pytest.mark.parametrize(("interval", "verdict"), [
    ([-0.4, 0.9], "lossless"), ([-1.2, 0.1], "undecided"), ([-3.0, -1.5], "worse"), ([2.0, 3.0], "better"),
    ([-0.9, -0.1], "lossless"), (None, "undecided"),
])  # fmt: skip
def test_what_an_interval_says_of_lossless(interval: list[float] | None, verdict: str) -> None:
    figures = {"interval": interval, "first_better": 1, "second_better": 0}
    assert judge_lossless(figures, 50, 1.0) == verdict


@pytest.mark.parametrize(("clusters", "verdict"), [(12, "undecided"), (290, "undecided"), (300, "lossless")])
def test_no_difference_on_few_videos_proves_nothing(clusters: int, verdict: str) -> None:
    assert judge_lossless({"interval": [0.0, 0.0], "first_better": 0, "second_better": 0}, clusters, 1.0) == verdict


@pytest.mark.parametrize(("grid", "words"), [
    ({"frames": (0, 4)}, "frames holds 0"), ({"frames": (4, 4)}, "frames names a value twice"),
    ({"margin": 0.0}, "margin is 0"),
])  # fmt: skip
def test_values_out_of_range_are_named(grid: dict[str, Any], words: str) -> None:
    with pytest.raises(KeyeError, match=words):
        Grid(**grid)
