"""`keye watch` plays a file, reports its event, and leaves a clip and a digest; mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keye.cli import main
from keye.hub import asset
from keye.media.video import probe


@pytest.mark.slow
def test_a_played_file_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, digest = tmp_path / "clips", tmp_path / "day.md"
    places = ["--clips", str(clips), "--digest", str(digest)]
    assert main(["watch", str(asset("demo.mp4")), "red circle", "--speed", "0", "--every", "2", "--json", *places]) == 0
    output = capsys.readouterr()
    reports = [json.loads(line) for line in output.out.splitlines()]
    assert [report["kind"] for report in reports] == ["start", "end"]
    # The circle is shown from 3.0 to 8.5 s.
    assert abs(reports[1]["start"] - 3.0) <= 0.5 and abs(reports[1]["end"] - 8.5) <= 1.0
    assert probe(reports[1]["clip"]).duration == pytest.approx(reports[1]["end"] - reports[1]["start"], abs=0.1)
    (day,) = tmp_path.glob("day-*.md")
    assert "red circle" in day.read_text() and "1 event" in output.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rtsp://127.0.0.1:9/x", "light"], "leads to the private address 127.0.0.1; give --allow-private-urls"),
        (["rtmp://host/x", "light"], "is not a live source"),
        (["demo", "light", "--webhook", "ftp://host"], "the webhook is not an http or https address"),
        (["demo", " "], "the event is empty"),
        (["demo", "light", "--threshold", "2"], "--threshold must be a probability"),
        (["demo", "light", "--digest", "/nonexistent/day.md"], "name a file in a folder that exists"),
    ],
)
def test_mistakes(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", *(str(asset("demo.mp4")) if word == "demo" else word for word in arguments)]) == 2
    assert sentence in capsys.readouterr().err
