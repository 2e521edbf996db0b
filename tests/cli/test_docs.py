"""The documentation shows the help as it is, and the demo video is what its script makes."""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.cli import VERBS
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.data.frameforge import make_clip, questions, render
from keye.hub import asset
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader
from tests.support.help_blocks import DOCS, documented, with_current_help

ROOT = Path(__file__).parents[2]


def test_help_in_the_docs_is_current() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert text == with_current_help(text), "run: python tests/support/help_blocks.py"


def test_every_verb_is_documented() -> None:
    displayed = documented(DOCS.read_text(encoding="utf-8"))
    assert {line.split()[1] for line in displayed if " " in line} == set(VERBS)


def test_the_demo_video_shows_its_scene() -> None:
    clip = make_clip(1978, frames=32, objects=4, split="test", size=(448, 448), start=0.0, step=0.5)
    with VideoReader(fetch_source(asset("demo.mp4"))) as reader:
        plan = reader.plan(ProcessorConfig(), MediaOptions(nframes=32))
        frames = reader.read(plan)
    assert plan.timestamps == clip.timestamps
    drawn = render(clip, (plan.width, plan.height)).astype(np.int16)
    assert np.abs(drawn - frames).mean() < 4
    requested = {question.text: question.answer for question in questions(clip, random.Random(0), 8)}
    assert requested["at what times is the red circle shown?"] == "[[3.0, 8.5]]"


def test_the_demo_video_can_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "examples/make_demo.py"))
    script["main"](tmp_path / "demo.mp4")
    assert "[[3.0, 8.5]]" in capsys.readouterr().out
    assert abs((tmp_path / "demo.mp4").stat().st_size - asset("demo.mp4").stat().st_size) < 4096


def test_the_example_of_places_draws_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/draw.py"))["main"](tmp_path / "marked.png")
    assert "'kind': 'polygon'" in capsys.readouterr().out
    with Image.open(tmp_path / "marked.png") as marked:
        assert marked.size == (448, 448) and marked.getpixel((347, 277)) != marked.getpixel((347, 340))
