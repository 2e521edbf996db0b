"""A search from the file to its moments, by the packaged model, and whatever ends it early."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import keye
from keye.cache.index_file import SEGMENTS_VERSION
from keye.media.source.fetch import INDEX_MAGIC
from keye.moments import FindProgress, FindResult, MomentsFound, SubtitleLine
from keye.sessions.search.tools import VideoTools


@pytest.fixture
def find(film: Path, nano: keye.Keye, film_index: Path) -> Any:
    """Searches the film by its index."""
    return lambda event, **options: nano.stream_find(
        film, event, **{"index": film_index, "subtitles": "none", **options}
    )  # fmt: skip


def test_a_moment_is_found_to_the_frame(find: Any) -> None:
    stream = find("the red circle")
    events = list(stream)
    result = events[-1]
    assert isinstance(result, FindResult) and stream.result is result and result.is_found
    (moment,) = result.moments[:1]
    assert (moment.start, moment.end) == (21.0, 23.0) and moment.rank == 1
    assert moment.checked == "twice" and moment.refined
    assert result.coverage.share == 1.0 and result.coverage.places >= 1 and not result.stopped
    before = [event for event in events if isinstance(event, MomentsFound)]
    assert before and moment.id in {other.id for event in before for other in event.moments}
    stages = [event.stage for event in events if isinstance(event, FindProgress)]
    assert stages == sorted(stages, key=["index", "coarse", "close", "verify"].index)


def test_what_is_not_there_is_not_found(find: Any) -> None:
    result = find("the green square").finish()
    assert not result.is_found and result.moments == ()
    assert result.coverage.places >= 1  # looked at closely all the same
    assert result.to_dict()["found"] is False


def test_later_questions_read_nothing_again(find: Any) -> None:
    events = list(find("the blue star", effort="low"))
    assert not [event for event in events if isinstance(event, FindProgress) and event.stage == "index"]
    assert events[-1].moments[0].start == 31.0


@pytest.mark.parametrize("budget", [700, 1000, 1400, 2000, 3000])
def test_every_stage_keeps_to_the_budget(find: Any, budget: int) -> None:
    result = find("the red circle", budget=budget, top=100).finish()
    # Tokens of a look are known about, those of a reply once it is there.
    assert result.coverage.query_tokens <= 1.1 * budget


def test_an_index_does_not_take_other_options(nano: keye.Keye, film: Path, film_index: Path, tmp_path: Path) -> None:
    index = tmp_path / "part.keye"
    nano.find(film, "the red circle", index=index, media_options={"video_end": 8.0})
    with pytest.raises(keye.KeyeError, match="give the video itself for video_start"):
        nano.find(index, "the red circle", media_options={"video_start": 2.0})
    assert nano.find(index, "the red circle").coverage.duration > 8.0


def test_a_budget_bounds_the_tokens(find: Any) -> None:
    result = find("the red circle", budget=200).finish()
    assert result.coverage.query_tokens < 300 and result.coverage.places == 0
    # Windows alone promise moments, but settle nothing.
    assert result.presence is None and result.is_found
    assert {(moment.checked, moment.probability) for moment in result.moments} == {("no", None)}
    (note,) = [note for note in result.notes if note.code == "no_look"]
    assert "not looked at closely: the budget of 200 tokens is too small" in note.text


def test_stopping_gives_the_best_so_far(find: Any) -> None:
    stream = find("the red circle")
    events = []
    for event in stream:
        events.append(event)
        if isinstance(event, MomentsFound):
            stream.stop()
    assert isinstance(events[-1], FindResult) and events[-1].stopped
    assert "stopped" in {note.code for note in events[-1].notes}


def test_a_deadline_stops(find: Any) -> None:
    assert find("the red circle", seconds=1e-6).finish().stopped


def test_an_interruption_leaves_the_best_so_far(find: Any) -> None:
    def interrupt() -> None:
        if stream.search.scored:
            raise KeyboardInterrupt

    stream = find("the red circle", check=interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.finish()
    result = stream.best_so_far()
    assert result.stopped and result.coverage.index_tokens > 0


def test_an_index_stands_for_its_video(nano: keye.Keye, film: Path, film_index: Path, tmp_path: Path) -> None:
    result = nano.find(film_index, "the red circle")
    assert (result.moments[0].start, result.moments[0].end) == (21.0, 23.0)
    copy = Path(shutil.copy(film, tmp_path / "copy.mp4"))
    nano.find(copy, "green cross", index=tmp_path / "copy.keye", subtitles="none", effort="low", scenes=False)
    with pytest.raises(keye.KeyeError, match="its own options"):
        nano.find(copy, "green cross", index=tmp_path / "copy.keye", media_options={"video_end": 10.0})
    copy.unlink()
    result = nano.find(tmp_path / "copy.keye", "the red circle")
    assert "no_video" in {note.code for note in result.notes} and result.coverage.places == 0


def test_an_index_that_is_damaged_is_replaced_on_demand(nano: keye.Keye, film: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.keye"
    path.write_bytes(INDEX_MAGIC + SEGMENTS_VERSION.to_bytes(4, "little") + bytes(64))
    with pytest.raises(keye.KeyeError, match="film.keye"):
        nano.find(film, "the red circle", index=path, seconds=1e-6)
    assert nano.find(film, "the red circle", index=path, seconds=1e-6, overwrite=True).stopped


def test_what_is_said_is_found_too(find: Any) -> None:
    lines = [SubtitleLine(2.0, 4.0, "here comes the purple cross")]
    result = find("the purple cross", subtitles=lines).finish()
    (moment,) = [moment for moment in result.weaker if moment.subtitle is not None]
    assert (moment.start, moment.end, moment.checked) == (2.0, 4.0, "no")


def test_tools_look_in_seconds(nano: keye.Keye, film: Path) -> None:
    with VideoTools(nano.engine, film) as tools:
        everything = tools.overview("is there a red circle in the video?")
        assert everything["start"] == 0.0 and everything["end"] == 40.0 and everything["text"] == "yes"
        near = tools.focus(17, 27, "when is the red circle visible?")
        assert near["intervals"] == [[21.0, 23.0]] and near["text"] == "[[21.0, 23.0]]"
        with pytest.raises(keye.KeyeError, match="focus takes at most 16 s, not 30"):
            tools.focus(0, 30, "what?")
        with pytest.raises(keye.KeyeError, match="the video ends at 40.0 s"):
            tools.skim(50, 60, "what?")
        with pytest.raises(keye.KeyeError, match="not a stretch of a video"):
            tools.skim(9, 3, "what?")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"effort": "most"}, "effort is 'most'; choose auto, low, medium, high"),
        ({"budget": 0}, "budget is 0; it must be a whole number above 0"),
        ({"top": 101}, "top is 101; at most 100 moments of a video are looked at"),
        ({"top": 1.5}, "top is 1.5; it must be a whole number above 0"),
        ({"threshold": 2}, "threshold is 2; it must be a probability from 0 to 1"),
        ({"seconds": -1}, "seconds is -1; it must be a number above 0"),
        ({"budgets": 3}, "find has no option budgets; did you mean budget?"),
    ],
)
def test_options_that_cannot_be(find: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(keye.KeyeError) as raised:
        find("the red circle", **options)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("event", ["", "  ", "x" * 501, None])
def test_events_that_are_none(find: Any, event: Any) -> None:
    with pytest.raises(keye.KeyeError, match="^the event "):
        find(event)


def test_words_that_the_model_does_not_know(find: Any) -> None:
    with pytest.warns(keye.KeyeWarning, match="the model does not know 'dog'"):
        stream = find("the red dog", budget=200)
    assert [note.code for note in stream.finish().notes].count("scope") == 1


@pytest.fixture(autouse=True)
def _close(nano: keye.Keye) -> Iterator[None]:
    yield
    assert not nano.core.tasks
