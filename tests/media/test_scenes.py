"""Hard cuts are the authored ones, in one pass with the frames that are sampled; interval ends move to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.scene_clips import pan, photo, still
from keye.errors import KeyeError
from keye.media.plan import VideoPlan
from keye.media.scenes import Scenes, SceneScan, find_scenes, snap
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader

Picture = NDArray[np.uint8]
SIZE = (160, 96)


def film(seed: int, lengths: list[int]) -> Iterator[Picture]:
    """A shot of each length in frames, moving and still by turns."""
    rng = np.random.default_rng(seed)
    for i, length in enumerate(lengths):
        yield from (pan if i % 2 else still)(rng, length, SIZE)


def write(path: Path, pictures: Iterator[Picture], codec: str = "libx264", fps: int = 25, bf: int = 2) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"bf": str(bf)})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scenes") / "clip.mp4", film(1, [30, 20, 45, 12, 40]))


def test_cuts_are_those_of_the_film(clip: Path) -> None:
    scenes = find_scenes(clip)
    assert scenes.cuts == pytest.approx([30 / 25, 50 / 25, 95 / 25, 107 / 25])
    assert [shot.start for shot in scenes.shots] == [0.0, *scenes.cuts]
    assert scenes.shots[-1].end == pytest.approx(147 / 25)
    assert len(scenes.scores) == 59 and scenes.scores[12] > 0.03 and scenes.scores[5] < 0.01


def test_one_pass_gives_the_same_frames_and_the_same_cuts(clip: Path) -> None:
    with VideoReader(fetch_source(clip)) as reader:
        plan = VideoPlan.of(reader.info, range(3, 140, 17), (28, 56), tokens_per_frame=0, rate=1)
        alone = list(reader.frames(plan))
        scan = SceneScan(reader.info)
        both = list(reader.frames(plan, scan=scan))
        assert np.array_equal(alone, both)
        assert scan.seen == 147 and scan.finish().cuts == find_scenes(clip).cuts
        assert np.array_equal(list(reader.frames(plan)), alone)  # the worker serves on


def test_a_part_of_a_file_is_scanned_by_itself(clip: Path) -> None:
    with VideoReader(fetch_source(clip)) as reader:
        scan = SceneScan(reader.info, range(40, 100))
        reader.scan(scan)
        scenes = scan.finish()
    assert scenes.cuts == pytest.approx([50 / 25, 95 / 25])
    assert (scenes.start, scenes.end) == pytest.approx((40 / 25, 100 / 25))


def test_a_reader_may_stop_early(clip: Path) -> None:
    with VideoReader(fetch_source(clip)) as reader:
        plan = VideoPlan.of(reader.info, range(0, 147, 10), (28, 56), tokens_per_frame=0, rate=1)
        scan = SceneScan(reader.info)
        for number, _ in enumerate(reader.frames(plan, scan=scan)):
            if number == 8:
                break
        assert scan.finish().cuts == pytest.approx([30 / 25, 50 / 25])
        assert len(list(reader.frames(plan))) == 15


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_cuts_of_animations(tmp_path: Path, kind: str) -> None:
    pictures = [Image.fromarray(picture) for picture in film(2, [9, 12, 8])]
    path = tmp_path / f"film.{kind.lower()}"
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=100)
    assert find_scenes(path).cuts == pytest.approx([0.9, 2.1])


def test_short_shots_can_be_joined_with_the_one_before(clip: Path) -> None:
    assert find_scenes(clip, min_length=0.6).cuts == pytest.approx([30 / 25, 50 / 25, 95 / 25])


def test_scenes_pass_through_json(clip: Path) -> None:
    scenes = find_scenes(clip)
    again = Scenes.from_dict(json.loads(json.dumps(scenes.to_dict())))
    assert again.cuts == scenes.cuts and np.array_equal(again.scores, scenes.scores)
    with pytest.raises(ValueError):
        Scenes.from_dict({**scenes.to_dict(), "cuts": [2.0, 1.0]})


def test_a_threshold_outside_its_range_is_an_error(clip: Path) -> None:
    with pytest.raises(KeyeError, match="threshold must be between 0 and 1"):
        find_scenes(clip, threshold=1.5)
    with pytest.raises(KeyeError, match="min_length must be a number"):
        find_scenes(clip, min_length=-1)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.9, 5.2), (2.0, 5.0, "both")),
        ((2.25, 4.0), (2.0, 4.0, "start")),
        ((3.0, 5.31), (3.0, 5.31, None)),
        ((4.0, 4.8), (4.0, 5.0, "end")),
        ((4.9, 5.05), (4.9, 5.0, "end")),
        ((7.0, 8.0), (7.0, 8.0, None)),
    ],
)
def test_borders_snap_to_cuts(interval: tuple[float, float], expected: tuple[float, float, str | None]) -> None:
    assert snap(interval, [2.0, 5.0]) == expected


def test_scores_are_bounded_and_quiet_where_nothing_moves(tmp_path: Path) -> None:
    picture = photo(np.random.default_rng(3), *SIZE)
    scenes = find_scenes(write(tmp_path / "still.mp4", (picture for _ in range(50))))
    assert scenes.cuts == () and scenes.step == pytest.approx(0.1)
    assert len(scenes.scores) == 20 and float(scenes.scores.max()) < 0.02
