"""The check of data before a run: every fault with its file and line."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.data.check import DataCheck, check_sets
from keye.data.sources import DataSet, open_samples
from keye.errors import KeyeError
from tests.support.clips import write_clip


def talk(text: str, **fields: Any) -> dict[str, Any]:
    return {"query": text, "response": "r", **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a video of two seconds, and both cut off."""
    path = tmp_path_factory.mktemp("media")
    file = io.BytesIO()
    Image.effect_noise((64, 48), 90).save(file, "PNG")
    (path / "a.png").write_bytes(file.getvalue())
    (path / "cut.png").write_bytes(file.getvalue()[:700])
    write_clip(path / "v.mp4", frames=60)
    (path / "cut.mp4").write_bytes((path / "v.mp4").read_bytes()[:900])
    (path / "text.mp4").write_text("This is a text and not a video at all. " * 20)
    return path


def check(folder: Path, rows: Sequence[Any], **options: Any) -> DataCheck:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return check_sets([DataSet(path)], seed=0, **options)


def reasons(result: DataCheck) -> dict[int, str]:
    assert all(skip.place.file.endswith("rows.jsonl") for skip in result.faults)
    return {skip.place.line: skip.reason for skip in result.faults}


def test_faults_of_rows_are_found_without_opening_media(folder: Path) -> None:
    rows = [talk("ok"), "{", talk("<image>", image="cut.png"), talk("x", image="none.png"), talk("x", response=""),
            talk("<image>")]  # fmt: skip
    result = check(folder, rows, media=0)
    assert sorted(reasons(result)) == [2, 4, 5, 6]
    assert (result.rows, result.media_checked, result.more, result.bad_rows) == (6, 0, 0, 4)


@pytest.mark.parametrize("media", [200, None])
def test_media_that_cannot_be_opened_are_found(media: int | None, folder: Path) -> None:
    rows = [
        talk("<image>", image="a.png"), talk("<image>", image="cut.png"), talk("<video>", video="v.mp4", fps=2),
        talk("<video>", video="cut.mp4"), talk("<video>", video="text.mp4"),
        talk("<video>", video="v.mp4", video_start=100), talk("<image>", image="v.mp4"),
        talk("<video>", video=["a.png", "cut.png"], fps=1), talk("<video>", video="a.png"),
        talk("<image>", response="<bbox>", image="a.png", objects={"bbox": [[0, 0, 999, 5]]}),
    ]  # fmt: skip
    result = check(folder, rows, media=media)
    reported = reasons(result)
    assert sorted(reported) == [2, 4, 5, 6, 7, 8, 9, 10]  # 7: an image is taken of no video file
    assert "cut.png" in reported[2]
    assert "a.png is an image" in reported[9]
    assert "outside its picture" in reported[10]


def test_only_so_many_rows_are_opened(folder: Path) -> None:
    rows = [talk("no medium") for _ in range(40)] + [talk(f"<image>{i}", image="a.png") for i in range(10)]
    result = check(folder, rows, media=4)
    assert result.media_checked == 1  # the same picture is opened once
    rows = [talk(f"<image>{i}", image="a.png", max_pixels=1000 + i) for i in range(10)]
    assert not check(folder, rows, media=4).faults


def test_an_answer_beyond_the_end_of_its_video_is_a_fault(folder: Path) -> None:
    (folder / "moments.csv").write_text("video,start,end,text\nv.mp4,0,1.5,a\nv.mp4,7,9,b\n")
    (fault,) = check_sets([DataSet(folder / "moments.csv")], seed=0).faults
    assert fault.place.line == 3
    assert "the answer names 9 s, and the video ends at" in fault.reason


def test_the_rows_of_a_run_are_those_that_are_checked(folder: Path) -> None:
    rows = [talk(str(number)) if number % 3 else "{" for number in range(60)]
    (folder / "part.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    dataset = DataSet.parse(f"{folder / 'part.jsonl'}#20")
    checked = check_sets([DataSet(folder / "part.jsonl", sample="#20")], seed=4)
    stream = open_samples([dataset], seed=4, epochs=1)
    assert len(list(stream)) == checked.rows - len(checked.faults)
    assert sorted(map(str, stream.skipped)) == sorted(map(str, checked.faults))


def test_progress_and_notes(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    rows = [talk("x", image="a.png", origin="web") for _ in range(5)]
    result = check(
        folder, rows, media=None, on_progress=lambda what, done, total, left: seen.append((what, done, total))
    )
    assert [("rows", 5, 5), ("media", 5, 5)] == [seen[0], seen[-1]]
    assert result.notes == {"texts have no <image> tag: images come first": 5, "the field origin is not used": 5}
    ((path, kind, count),) = result.formats
    assert (Path(path).name, kind, count) == ("rows.jsonl", "JSON lines", 5)


def test_a_set_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="nowhere.jsonl cannot be read"):
        check_sets([DataSet(tmp_path / "nowhere.jsonl")], seed=0)
