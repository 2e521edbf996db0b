"""A search index: what is read of a video is the same however often the reading was interrupted, and a question put to
all windows at once scores on each what it scores alone."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keye
from keye import Keye, KeyeError, SamplingParams
from keye.cache.segments import Segment, open_for_writing, read_segments
from keye.config import model_config_from_dict
from keye.engine.media import as_medium
from keye.models.load import save_model
from keye.moments import Coverage
from keye.sessions.search.build import WindowsReady, build_search_index
from keye.sessions.search.headers import IndexContents
from keye.sessions.search.scoring import answer_ids, rank_evidence, score_windows, thinking_of
from keye.sessions.search.search_index import SearchIndex, open_search_index
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.clips import write_clip
from tests.support.disk import FullDisk
from tests.support.tiny import tiny_raw

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


def test_what_lies_outside_the_part_is_unseen(model: Keye, video: Path, tmp_path: Path) -> None:
    part = as_medium(video, {"video_start": 8, "video_end": 10})
    events = build_search_index(model.engine, part, tmp_path / "part.keye", **CHOICES)
    first = next(events)
    assert (first.done, first.total) == (0.0, 2.0)
    index = finish(events)
    assert index.is_complete and index.unseen == [(0.0, 8.0), (10.0, 12.0)]
    coverage = Coverage(index.duration, index.seen, index.unseen, 0, index.frames, index.tokens, 0)
    assert coverage.share == pytest.approx(2 / 12)


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
        assert score.evidence is not None and score.evidence.shape == (score.tokens, 8)
        assert alone.evidence is not None and np.allclose(alone.evidence, score.evidence, atol=1e-4)
    ranks = rank_evidence(together)
    assert [len(rank) for rank in ranks] == [8] * 5 and max(float(rank.max()) for rank in ranks) > 1
    assert rank_evidence([replace(score, evidence=None) for score in together]) == []


def test_a_window_is_the_past_of_any_prompt(model: Keye, index: SearchIndex) -> None:
    """The scores are those that a request sees behind the same stored window."""
    (score,) = score_windows(model.engine, [(index, 2)], QUESTION, evidence=False)
    builder = model.runtime.prompts
    _, tail = builder.encode_around(QUESTION, template=model.runtime.template, thinking=thinking_of(model.runtime))
    prompt = builder.extend(index.past(2), tail)

    def logprob(token: int) -> float:
        params = SamplingParams(max_tokens=1, allowed_token_ids=(token,))
        (result,) = model.engine.generate([prompt], params)
        return float(result.completions[0].raw_logprobs[0])

    yes, no = ([logprob(token) for token in answer_ids(model.runtime, answer).tolist()] for answer in ("yes", "no"))
    assert score.yes == pytest.approx(float(np.logaddexp.reduce(yes) - np.logaddexp.reduce(no)), abs=1e-3)
    assert score.mass == pytest.approx(float(np.exp(yes).sum() + np.exp(no).sum()), abs=1e-4)
    assert score.lifts is None and score.tokens == prompt.length - index.all[2].tokens


@pytest.mark.parametrize("architecture", ["KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"])
def test_windows_of_the_other_releases(architecture: str, folder: Path, video: Path, tmp_path: Path) -> None:
    """Preview reads all frames of a window at once, 1.5 would classify them as slow and fast: here all are slow."""
    raw = tiny_raw() | {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForConditionalGeneration"),
    }
    own = tmp_path / "own"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("*.safetensors"))
    plain = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520}
    (own / "preprocessor_config.json").write_text(json.dumps(plain))
    (own / "config.json").write_text(json.dumps(raw))
    save_model(fresh_model(model_config_from_dict(raw), 0), own)
    model = keye.load(own, dtype="float32")
    medium = as_medium(video, {"max_pixels": 28 * 28 * 16})
    index = finish(build_search_index(model.engine, medium, tmp_path / "film.keye", spacing=1.0, window_frames=8))
    scores = list(score_windows(model.engine, [(index, window.number) for window in index.windows], QUESTION))
    assert len(scores) == 2 and all(math.isfinite(score.yes) and score.lifts is None for score in scores)
    assert index.past(1).timestamps == index.all[1].labels


def test_a_killed_run_goes_on_to_the_same_file(model: Keye, video: Path, index: SearchIndex, tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    events = build(model, video, path)
    next(event for event in events if isinstance(event, WindowsReady))
    events.close()
    assert 0 < len(open_search_index(model.runtime, path).windows)
    resumed = finish(build(model, video, path))
    assert resumed.is_complete
    assert path.read_bytes() == index.path.read_bytes()


def test_wide_windows_come_first_where_it_takes_long(model: Keye, video: Path, tmp_path: Path) -> None:
    """The first windows cover more of the video; the finer ones replace them, and all is there when it ends."""
    path, frames = tmp_path / "film.keye", list[float]()
    events = build(model, video, path, wide_first=True, on_frames=lambda pixels, times: frames.extend(times))
    first = next(event for event in events if isinstance(event, WindowsReady))
    assert [window.spacing for window in first.index.windows] == [2.0] and not first.index.is_complete
    assert first.index.unseen == [] and not frames
    index = finish(events)
    assert {window.spacing for window in index.windows} == {0.5} and len(index.all) > len(index.windows)
    assert len(frames) == len(set(frames)) == index.frames
    assert index.scenes_end == pytest.approx(index.duration)


def test_a_run_that_is_killed_between_levels_goes_on(model: Keye, video: Path, tmp_path: Path) -> None:
    files = []
    for interrupted in (True, False):
        path = tmp_path / f"{interrupted}.keye"
        for _ in range(20 if interrupted else 1):
            events = build(model, video, path, wide_first=True)
            for event in events:
                if interrupted and isinstance(event, WindowsReady):
                    break
            events.close()
        files.append(open_search_index(model.runtime, path))
    ours, theirs = files
    assert ours.is_complete and theirs.is_complete
    assert [window.times for window in ours.all] == [window.times for window in theirs.all]
    assert [window.prior for window in ours.all] == [window.prior for window in theirs.all]
    scores = [
        [score.yes for score in score_windows(model.engine, [(index, w.number) for w in index.windows], QUESTION)]
        for index in files
    ]
    assert scores[0] == scores[1]


def test_a_disk_that_fills_up_leaves_a_valid_index(
    model: Keye, video: Path, index: SearchIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film.keye"
    monkeypatch.setattr("keye.sessions.search.build._SEGMENT_BYTES", 1)  # a window in each
    room = index.path.stat().st_size // 2
    with pytest.raises(KeyeError, match="no room is left to write"):
        finish(build(model, video, path, open_file=lambda path: FullDisk(open_for_writing(path), room)))
    stored = open_search_index(model.runtime, path)
    assert 0 < len(stored.windows) < 5 and not stored.is_complete and stored.unseen
    (score,) = score_windows(model.engine, [(stored, 0)], QUESTION)
    assert math.isfinite(score.yes)
    assert len(finish(build(model, video, path)).windows) == 5


def test_an_index_is_of_one_video_and_one_model(
    model: Keye, video: Path, index: SearchIndex, tmp_path: Path, folder: Path
) -> None:
    path = Path(shutil.copyfile(index.path, tmp_path / "film.keye"))
    other = write_clip(tmp_path / "other.mp4", frames=8, fps=2)
    with pytest.raises(KeyeError, match=r"film.keye is a search index of film.mp4: name another file, or give"):
        finish(build(model, other, path))
    with pytest.raises(KeyeError, match="was made with a frame every 0.5 s in windows of 8"):
        finish(build_search_index(model.engine, as_medium(video), path, spacing=1.0))
    with pytest.raises(KeyeError, match="it was computed in float32|was computed in float32"):
        open_search_index(keye.load(folder, dtype="bfloat16").runtime, path)
    with pytest.raises(KeyeError, match="use keye find"):
        model.ask(path, "what?")
    assert finish(build(model, other, path, overwrite=True)).source_name == "other.mp4"


def test_wrong_choices(model: Keye, video: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    (tmp_path / "text.txt").write_text("mine")
    for message, medium, target, choices in (
        ("effort is 'huge'; choose one of auto, low, medium, high", as_medium(video), path, {"effort": "huge"}),
        ("spacing is 0 s; choose", as_medium(video), path, {"spacing": 0}),
        ("window_frames is 1; choose 2 to 256", as_medium(video), path, {"window_frames": 1}),
        ("has no effect on a search index", as_medium(video, {"max_frames": 4}), path, {}),
        ("lies after the end of the video at 12.00 s", as_medium(video, {"video_start": 13}), path, {}),
        ("is made of a video file", as_medium(index_frames()), path, {}),
        ("exists and is not an earlier output", as_medium(video), tmp_path / "text.txt", {}),
    ):
        with pytest.raises(KeyeError, match=message):
            finish(build_search_index(model.engine, medium, target, **choices))
    assert not path.exists()


def index_frames() -> keye.Frames:
    return keye.Frames(np.zeros((4, 56, 56, 3), dtype=np.uint8), [0.0, 1.0, 2.0, 3.0])


def test_noise_in_rows_ends_the_question_that_reads_them(model: Keye, index: SearchIndex, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(index.path, tmp_path / "film.keye"))
    segment = next(segment for segment in read_segments(path) if segment.kind == "windows")
    assert segment.image is not None
    place = segment.start + segment.image.sections["indexer_k"].offset + 40
    data = bytearray(path.read_bytes())
    data[place : place + 16] = b"noise" * 3 + b"!"
    path.write_bytes(data)
    own = open_search_index(model.runtime, path)
    with pytest.raises(KeyeError, match=r"film\.keye is damaged \(KV block"):
        list(score_windows(model.engine, [(own, window.number) for window in own.windows], QUESTION))
    assert model.runtime.ledger.accounts().get("kv", 0) == 0 or model.runtime.store.nbytes() >= 0


def test_headers_with_other_values_are_refused(model: Keye, index: SearchIndex, tmp_path: Path) -> None:
    """Whatever a header says in the place of any value: an error of one sentence, never another one."""
    generator, path = random.Random(3), tmp_path / "film.keye"
    head, *segments = read_segments(index.path)
    odd = [None, -1, 0, 10**12, 1e300, "text", [], {}, [1, "a"], True, float(1 << 40)]
    rejected = 0
    for _ in range(120):
        path.unlink(missing_ok=True)
        about: Any = copy.deepcopy(generator.choice([head, *segments]).about)
        places = list(leaves({key: value for key, value in about.items() if key not in ("segment", "storage")}))
        parent, key = generator.choice(places)
        kind, target = about.pop("segment"), about
        for name in parent:
            target = target[name]
        target[key] = generator.choice(odd)
        try:
            contents = IndexContents.read(path, [Segment(0, 1, "head", about if kind == "head" else head.about, None)])
            for segment in segments:
                contents.add(replace(segment, about=about) if segment.kind == kind else segment)
            describe(contents)
        except KeyeError as error:
            rejected += 1
            assert_sentence(error)
    assert rejected > 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("height", 0), ("width", -28), ("width", 1 << 20), ("spacings", [1e-6]), ("spacings", [20_000.0]), ("frames", 257),
     ("options", {"colour": 1}), ("options", {"fps": -1}), ("options", {"video_start": "soon"})],
)  # fmt: skip
def test_plans_that_keye_does_not_make(index: SearchIndex, tmp_path: Path, name: str, value: object) -> None:
    about: Any = copy.deepcopy(read_segments(index.path)[0].about)
    about["plan"][name] = value
    with pytest.raises(KeyeError) as error:
        IndexContents.read(tmp_path / "film.keye", [Segment(0, 1, "head", about, None)])
    assert_sentence(error.value)


def leaves(value: Any, parent: tuple[Any, ...] = ()) -> Any:
    """Every place in plain data: the path to what holds it, and its key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield parent, key
        yield from leaves(inner, (*parent, key))


def describe(contents: IndexContents) -> None:
    """Uses what was read."""
    for window in contents.windows:
        window.to_file(1.0), window.to_clock(window.start)
    assert contents.scenes_end >= 0


def assert_sentence(error: KeyeError) -> None:
    assert "film.keye is damaged (" in str(error) and len(str(error)) < 300


def test_an_index_is_of_the_weights_that_computed_it(folder: Path, index: SearchIndex) -> None:
    model = keye.load(folder, dtype="float32")
    own = open_search_index(model.runtime, index.path)
    name, tensor = next(iter(model.model.state_dict().items()))
    model.engine.update_weights({name: tensor + 1})
    with pytest.raises(KeyeError, match="the weights were replaced since"):
        list(score_windows(model.engine, [(own, 0)], QUESTION))
    with pytest.raises(KeyeError, match="with other weights"):
        open_search_index(model.runtime, index.path)
