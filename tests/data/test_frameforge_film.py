"""Films of FrameForge: the gold answers are what the file shows, to the frame, and the file is an ordinary one."""

import json
import random
from dataclasses import asdict

import av
import numpy as np
import pytest

from keye.data.frameforge.film import FILM_SIZE, FilmEvent, piece_clip, plan_film, to_seconds
from keye.data.frameforge.film_file import write_film
from keye.data.frameforge.render import render
from keye.errors import KeyeError

FRAME = 0.08


@pytest.fixture(scope="module")
def film():
    return plan_film(3, minutes=0.75, needles=2, event=1.0, near_misses=3)


@pytest.fixture(scope="module")
def file(film, tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(film, path, sound=True)
    return path


@pytest.fixture(scope="module")
def decoded(file):
    """Times of all frames, and small pictures of them."""
    with av.open(str(file)) as container:
        frames = [
            (float(frame.pts * frame.time_base), frame.reformat(160, 90, "rgb24").to_ndarray())
            for frame in container.decode(video=0)
        ]
    return np.array([time for time, _ in frames]), np.stack([pixels for _, pixels in frames]).astype(np.int16)


def test_the_same_seed_gives_the_same_film(film):
    assert plan_film(3, minutes=0.75, needles=2, event=1.0, near_misses=3) == film
    assert plan_film(4, minutes=0.75, needles=2, event=1.0, near_misses=3).needles != film.needles
    assert plan_film(3, minutes=0.75, needles=2, event=1.0, near_misses=3, split="train").needles != film.needles


def test_frames_follow_one_another_from_zero_to_the_end(film, decoded):
    times, _ = decoded
    assert len(times) == film.frames
    assert times == pytest.approx(np.arange(film.frames) * FRAME, abs=1e-6)


def test_the_file_says_how_long_it_is_and_has_sound(film, file):
    with av.open(str(file)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert float(video.duration * video.time_base) == pytest.approx(film.duration)
        assert float(sound.duration * sound.time_base) == pytest.approx(film.duration, abs=0.05)
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(sound)])
    assert 0.02 < np.abs(samples[4096:-4096]).max() < 0.1


def test_seeking_finds_the_frame_of_a_time(film, file, decoded):
    times, pictures = decoded
    with av.open(str(file)) as container:
        for event in film.needles:
            wanted = round(event.start / FRAME)
            container.seek(round(event.start * 1e6), backward=True)
            frame = next(f for f in container.decode(video=0) if f.pts * f.time_base >= event.start - 1e-6)
            assert float(frame.pts * frame.time_base) == pytest.approx(times[wanted])
            pixels = frame.reformat(160, 90, "rgb24").to_ndarray().astype(np.int16)
            assert np.abs(pixels - pictures[wanted]).mean() < 0.5


@pytest.mark.parametrize("seed", [1, 4])
def test_needles_are_seen_from_their_first_frame_to_their_last(tmp_path, seed):
    film = plan_film(seed, minutes=0.5, needles=2, event=0.56, near_misses=0)
    write_film(film, tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as container:
        pictures = np.stack([f.reformat(160, 90, "rgb24").to_ndarray() for f in container.decode(video=0)])
    for event in film.needles:
        first, after = round(event.start / FRAME), round(event.end / FRAME)
        changes = np.abs(np.diff(pictures[first - 2 : after + 2].astype(np.int16), axis=0)).max(axis=(1, 2, 3))
        assert changes[1] > 60, "it appears at the start"
        assert changes[-2] > 60, "it is gone at the end"
        assert changes[0] < 40
        assert changes[-1] < 40


def test_cuts_are_where_the_picture_changes(film, decoded):
    _, pictures = decoded
    corners = pictures[:, :4, :4].mean(axis=(1, 2))
    changes = np.flatnonzero(np.abs(np.diff(corners, axis=0)).max(axis=1) > 20) + 1
    assert set(np.round(film.cuts, 3)) >= {to_seconds(int(frame)) for frame in changes}
    for cut in film.cuts:
        frame = round(cut / FRAME)
        assert np.abs(pictures[frame] - pictures[frame - 1]).mean() > 5


@pytest.mark.parametrize("split", ["train", "test", "unseen"])
def test_needles_are_seen_once_and_absent_pairs_never(split):
    film = plan_film(11, minutes=60, split=split)
    names = [event.name for event in film.needles]
    assert len(set(names)) == len(names) == 13
    common = {event.name for event in film.near_misses}
    assert not common & set(names)
    assert not set(film.absent) & (common | set(names))
    seen = {" ".join(pair) for piece in film.pieces for pair in piece_clip(piece).scene.pairs()}
    assert seen == common | set(names)


def test_every_question_has_near_misses():
    film = plan_film(5, minutes=120)
    counts = [len(film.near_misses_of(name)) for name in (*film.absent, *(event.name for event in film.needles))]
    assert min(counts) >= 20
    assert sum(counts) / len(counts) >= 40


def test_events_lie_inside_a_piece_and_last_as_long_as_asked():
    for event in (0.5, 2.0, 10.0):
        film = plan_film(2, minutes=20, event=event)
        assert all(needle.seconds == pytest.approx(round(event * 12.5) * FRAME) for needle in film.needles)
        for piece in film.pieces:
            assert all(0 < item.interval[0] <= item.interval[1] < piece.frames - 1 for item in piece.events)


def test_films_of_one_split_share_their_empty_pieces():
    first, second = ({p for p in plan_film(seed, minutes=60).pieces if not p.events} for seed in (1, 2))
    assert first & second
    assert not first & {p for p in plan_film(1, minutes=60, split="train").pieces if not p.events}


def test_the_gold_answers_are_plain_data(film):
    value = json.loads(json.dumps(film.to_dict()))
    assert value["needles"][0] == asdict(film.needles[0])
    assert value["duration"] == film.duration
    assert FilmEvent(**value["needles"][0]) == film.needles[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"event": 0.1}, "event is 0.08 s"),
        ({"event": 11.0}, "0.5 to 10 seconds"),
        ({"minutes": 0.1}, "minutes is 0.1"),
        ({"needles": 27}, "needles is 27; choose 0 to 26"),
        ({"near_misses": 11}, "near_misses is 11"),
        ({"minutes": 1.0, "needles": 13}, "too short for 13 needles"),
    ],
)
def test_arguments_out_of_range(options, sentence):
    with pytest.raises(KeyeError, match=sentence):
        plan_film(1, **options)


def test_pieces_are_scenes_of_the_size_of_the_film():
    piece = random.Random(1).choice([p for p in plan_film(1, minutes=10, needles=5).pieces if p.events])
    assert render(piece_clip(piece), FILM_SIZE).shape == (piece.frames, 360, 640, 3)
