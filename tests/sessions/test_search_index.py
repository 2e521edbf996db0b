"""A search index: what is read of a video is the same however often the reading was interrupted, and a question put to
all windows at once scores on each what it scores alone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keye
from keye import Keye
from keye.engine.media import as_medium
from keye.sessions.search.build import WindowsReady, build_search_index
from keye.sessions.search.scoring import score_windows
from keye.sessions.search.search_index import SearchIndex, open_search_index
from tests.support.clips import write_clip

#: 24 frames at 2 a second, in windows of 8 that share 4: five of them.
CHOICES: dict[str, Any] = {"spacing": 0.5, "window_frames": 8}
QUESTION = "is there a red circle in the video?"


@pytest.fixture(scope="module")
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "film.mp4"
    write_clip(path, frames=24, fps=2)
    return path


def build(model: Keye, video: Path, path: Path, **choices: Any) -> Generator[Any, None, SearchIndex]:
    return build_search_index(model.engine, as_medium(video), path, **CHOICES, **choices)


def finish(events: Generator[Any, None, SearchIndex]) -> SearchIndex:
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def index(model: Keye, video: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return finish(build(model, video, tmp_path_factory.mktemp("index") / "film.keye"))


def test_windows_cover_the_video_and_share_frames(index: SearchIndex) -> None:
    assert index.is_complete and index.unseen == []
    assert [len(window.times) for window in index.windows] == [8, 8, 8, 8, 8]
    first, second = index.windows[:2]
    assert first.times[-4:] == second.times[:4] and second.labels[0] == 0.0
    assert index.frames == 24 and index.windows[-1].end == index.duration
    assert [span.spacing for span in index.seen] == [0.5]


def test_a_question_scores_on_all_windows_what_it_scores_on_each(model: Keye, index: SearchIndex) -> None:
    windows = [(index, window.number) for window in index.windows]
    together = list(score_windows(model.engine, windows, QUESTION))
    assert [score.number for score in together] == [0, 1, 2, 3, 4]
    for pair, score in zip(windows, together, strict=True):
        (alone,) = score_windows(model.engine, [pair], QUESTION)
        assert alone.yes == pytest.approx(score.yes, abs=1e-4)
        assert score.lifts is not None and alone.lifts is not None
        assert np.abs(score.raw_lifts.sum() - len(score.lifts)) < 1e-3
        assert 0 < score.probability < 1 and 0 < score.mass < 1 and score.prior is not None


def test_a_window_is_the_past_of_any_prompt(model: Keye, index: SearchIndex) -> None:
    """The scores are the logits that a request behind the same stored window sees."""
    (score,) = score_windows(model.engine, [(index, 2)], QUESTION, evidence=False)
    past, builder = index.past(2), model.runtime.prompts
    _, tail = builder.encode_around(QUESTION, template=model.runtime.template)
    prompt = builder.extend(past, tail)
    yes, no = (model.tokenizer.encode(word)[0] for word in ("yes", "no"))
    (result,) = model.engine.generate(
        [prompt], model.runtime.sampling_params(max_tokens=1, temperature=0.0, allowed_token_ids=(yes, no))
    )
    assert (result.completions[0].token_ids[0] == yes) == (score.yes > 0) or abs(score.yes) < 1


def test_a_killed_run_goes_on_to_the_same_file(model: Keye, video: Path, index: SearchIndex, tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    events = build(model, video, path)
    next(event for event in events if isinstance(event, WindowsReady))
    events.close()
    assert 0 < len(open_search_index(model.runtime, path).windows)
    resumed = finish(build(model, video, path))
    assert resumed.is_complete
    assert path.read_bytes() == index.path.read_bytes()
