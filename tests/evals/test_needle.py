"""The needle evaluation on a short film and a model that knows nothing."""

import json

import numpy as np
import pytest

from keye.api import Keye
from keye.cli import main
from keye.data.frameforge import plan_film, write_film
from keye.errors import KeyeError
from keye.evals.tasks.needle import NeedleOptions, ask_in_one_pass, evaluate, film_questions, search_film
from keye.scoring.search import one_pass_ceiling
from tests.support.tiny import tiny_folder, tiny_model


@pytest.fixture(scope="module")
def film():
    return plan_film(1, minutes=0.2, needles=1, near_misses=0, event=0.56)


@pytest.fixture(scope="module")
def file(film, tmp_path_factory):
    path = tmp_path_factory.mktemp("needle") / "film.mp4"
    write_film(film, path)
    return path


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("split", "train", "split is 'train'"),
        ("films", 0, "films is 0"),
        ("questions", 0, "questions is 0"),
        ("questions", 14, "at most 13"),
        ("minutes", 0.5, "too short"),
        ("event", 60.0, "event is 60 s"),
    ],
)
def test_options_out_of_range(field, value, sentence):
    with pytest.raises(KeyeError, match=sentence):
        NeedleOptions(**{field: value})


def test_questions_about_what_happens_and_what_does_not_take_turns():
    film = plan_film(5, minutes=10, needles=6)
    questions = film_questions(film, 4)
    assert [gold is None for _, gold in questions] == [False, True] * 4
    assert len({name for name, _ in questions}) == 8
    assert [gold for _, gold in questions[::2]] == [(event.start, event.end) for event in film.needles[:4]]
    assert {name for name, _ in questions[1::2]} <= set(film.absent)


def test_a_film_is_searched_and_read_in_one_pass(film, file):
    model = Keye(tiny_model())
    rows = list(search_film(model, film, 7, file, 1))
    assert [(row.film, row.name, row.gold) for row in rows] == [(7, *item) for item in film_questions(film, 1)]
    assert all(row.index_tokens > 0 and row.query_tokens > 0 and row.wall > 0 for row in rows)
    assert [row.is_first for row in rows] == [True, False]
    others = list(ask_in_one_pass(model, film, 7, file, 1, tokens=200))
    assert [(row.name, row.gold) for row in others] == film_questions(film, 1)
    assert all(100 < row.query_tokens <= 200 for row in others)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "tiny")
    arguments = ["eval", "needle", "--model", str(folder), "--films", "1", "--minutes", "1", "--questions", "1"]
    assert main([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["present"]["n"], value["absent"]["n"]) == (1, 1)
    assert value["baselines"]["perfect_one_pass"]["1.0"]["miou"] == one_pass_ceiling(2.0, 1.0).miou
    assert np.isfinite(value["costs"]["further"]["cpu"])
    assert main(arguments) == 0
    assert "perfect, 1 frame / 2.5 s" in capsys.readouterr().out


def test_progress_and_figures():
    seen = []
    options = NeedleOptions(films=1, minutes=0.2, questions=1, near_misses=0, event=0.56, baselines=False)
    result = evaluate(Keye(tiny_model()), options, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert result["films"] == 1
    assert "baselines" not in result
