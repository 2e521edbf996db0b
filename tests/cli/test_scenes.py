"""`keye scenes` lists shots as text, JSON and a table, and writes a picture of each."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from keye.cli import main
from tests.media.test_scenes import film, write


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scenes") / "clip.mp4", film(1, [30, 20, 25]))


def test_shots_as_text(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(clip)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "3 shots, 2 cuts",
        "1 0.0 s to 1.2 s (1.2 s)",
        "2 1.2 s to 2.0 s (0.8 s)",
        "3 2.0 s to 3.0 s (1.0 s)",
    ]


def test_shots_as_json_and_as_a_table(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(clip), "--json", "--min-length", "0.9"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cuts"] == [1.2] and [scene["end"] for scene in result["scenes"]] == [1.2, 3.0]
    assert main(["scenes", str(clip), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["start"] for row in rows] == ["0.000", "1.200", "2.000"]


def test_a_picture_of_each_shot(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    for _ in range(2):  # the second run replaces what the first one wrote
        assert main(["scenes", str(clip), "--thumbnails", str(folder)]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["clip-0001-0.0s.jpg", "clip-0002-1.2s.jpg", "clip-0003-2.0s.jpg"]
    assert Image.open(folder / names[0]).size == (160, 96)
    (folder / names[1]).write_bytes(b"mine")
    assert main(["scenes", str(clip), "--thumbnails", str(folder)]) == 2
    assert (folder / names[1]).read_bytes() == b"mine" and "overwrite" in capsys.readouterr().err


def test_titles_come_from_the_model(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(clip), "--titles", "--json"]) == 0
    assert all(isinstance(scene["title"], str) for scene in json.loads(capsys.readouterr().out)["scenes"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threshold", "2"], "threshold must be between 0 and 1"),
        (["--csv", "--json"], "exclude each other"),
        (["--min-length", "-1"], "must be above 0"),
    ],
)
def test_mistakes(clip: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(clip), *arguments]) == 2
    assert sentence in capsys.readouterr().err
