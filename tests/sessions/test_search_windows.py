"""Windows of a video and their clocks; where indexes are kept."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye import KeyeError
from keye.cache.fingerprint import Fingerprint
from keye.media.source.fetch import fetch_source
from keye.sessions.search import places
from keye.sessions.search.windows import choose_frames, choose_step, count_overlap, label_frames, plan_windows

MODEL = Fingerprint("tiny", "float32", "c", "p", "w")


@given(st.integers(2, 400), st.floats(0.02, 3.0), st.floats(0.05, 9.0), st.integers(2, 40), st.floats(0, 0.9))
def test_windows_cover_every_second_with_clocks_of_their_own(
    frames: int, step: float, spacing: float, size: int, uneven: float
) -> None:
    rng = np.random.default_rng(frames)
    times = np.cumsum(step * (1 + uneven * rng.uniform(-1, 1, frames))).round(6).tolist()
    duration = times[-1] + step
    chosen = choose_frames(times, duration, spacing)
    windows = plan_windows(times, duration, chosen, spacing=spacing, frames=size)
    assert sorted({time for window in windows for time in window.times}) == [times[i] for i in chosen]
    assert windows[0].start == times[chosen[0]] and windows[-1].end == duration
    for window, after in pairwise(windows):
        assert window.end > after.start or count_overlap(spacing, size) == 0
        assert len(window.times) == size
    for window in windows:
        assert window.labels[0] == 0.0 and all(b > a for a, b in pairwise(window.labels))
        if len(window.times) > 1:
            assert min(np.diff(window.labels)) >= 0.2 - 1e-6  # what labels with one decimal can tell
        for time, label in zip(window.times, window.labels, strict=True):
            assert window.to_file(label) == pytest.approx(time) and window.to_clock(time) == pytest.approx(label)
        assert window.to_file(1e9) == pytest.approx(window.end) and window.to_file(-5.0) == window.start
        assert window.to_file(window.to_clock(window.end)) == pytest.approx(window.end)


def test_a_clock_runs_slower_where_frames_lie_close() -> None:
    for times, step, labels in (
        ([40.0, 41.0, 42.5], None, (0.0, 1.0, 2.5)),
        ([40.0, 40.1, 40.2], 0.5, (0.0, 0.5, 1.0)),
    ):
        assert choose_step(times) == step and label_frames(times, step) == labels


def test_frames_are_moved_to_changes() -> None:
    times = [0.1 * i for i in range(400)]
    scores = np.full(400, 0.01)
    scores[[57, 203]] = 0.8
    plain = choose_frames(times, 40.0, 4.0)
    moved = choose_frames(times, 40.0, 4.0, changes=(np.array(times), scores))
    assert plain == list(range(0, 400, 40))
    assert sorted(set(moved) - set(plain)) == [57, 203] and len(moved) == len(plain)


def test_too_many_frames_and_parts_without_any() -> None:
    times = [0.1 * i for i in range(400)]
    with pytest.raises(KeyeError, match="choose a wider spacing"):
        choose_frames([0.0, 1e6], 1e6 + 1, 0.01)
    with pytest.raises(KeyeError, match="video_start=50 lies after the end of the video at 40.00 s"):
        choose_frames(times, 40.0, 1.0, start=50.0, end=60.0)
    assert choose_frames([0.0, 1.0, 1.5], 2.0, 1.0, start=1.95) == [2]


def test_indexes_are_found_again_by_what_they_were_made_of(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"film" * 100)
    (tmp_path / "b.mp4").write_bytes(b"film" * 100)
    (tmp_path / "c.mp4").write_bytes(b"other" * 100)
    sources = [fetch_source(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4")]
    paths = [places.default_index_path(source, MODEL, "high", tmp_path) for source in sources]
    assert paths[0] == paths[1] != paths[2]
    assert places.default_index_path(sources[0], MODEL, "low", tmp_path) != paths[0]
    assert places.default_index_path(sources[0], replace(MODEL, weights="v"), "high", tmp_path) != paths[0]


def test_large_files_are_known_by_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "HASHED_BYTES", 1 << 20)
    path = tmp_path / "film.mp4"
    path.write_bytes(bytes(32 << 20))
    os.utime(path, (1, 1))
    before = places.identify_source(fetch_source(path))
    assert before.startswith("pieces:")
    with path.open("r+b") as file:
        file.seek(16 << 20)
        file.write(b"changed")
    os.utime(path, (1, 1))
    assert places.identify_source(fetch_source(path)) != before


def test_the_least_recently_used_indexes_make_room(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"{number}.keye"
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    (tmp_path / "notes.txt").write_bytes(bytes(1000))
    places.note_use(tmp_path / "0.keye")
    with pytest.raises(KeyeError, match="more than the 0 MB that their folder may hold: name a file with index"):
        places.make_room(451, folder=tmp_path, most=450)
    removed = places.make_room(150, keep=tmp_path / "1.keye", folder=tmp_path, most=450)
    assert [path.name for path in removed] == ["2.keye", "3.keye"]
    assert {path.name for path in tmp_path.iterdir()} == {"0.keye", "1.keye", "4.keye", "notes.txt"}
    assert places.make_room(0, folder=tmp_path, most=450) == []
