"""One question put to all videos of a library."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import keye
from keye.data.frameforge import Film, plan_film, write_film
from keye.errors import KeyeError
from keye.hub import asset
from keye.library.catalog import Catalog
from keye.library.find import LibraryResult, LibrarySearch
from keye.library.indexing import index_library
from keye.moments import MomentsFound
from tests.library.test_vectors import MeanColors

LATER = 4e9


@pytest.fixture(scope="module")
def nano() -> keye.Keye:
    return keye.load("nano")


@pytest.fixture(scope="module")
def film() -> Film:
    return plan_film(3, minutes=0.5, needles=1, split="test")


@pytest.fixture(scope="module")
def catalog(nano: keye.Keye, film: Film, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("library")
    (folder / "films").mkdir()
    write_film(film, folder / "films/needle.mp4")
    shutil.copy(asset("demo.mp4"), folder / "films/demo.mp4")
    (folder / "films/broken.mp4").write_bytes(asset("demo.mp4").read_bytes()[:3000])
    catalog = Catalog(folder / "library")
    catalog.add_folder(folder / "films")
    catalog.scan(now=LATER)
    list(index_library(nano, catalog, embedder=MeanColors()))
    return catalog


def search(nano: keye.Keye, catalog: Catalog, event: str, **options: object) -> LibraryResult:
    *_, result = LibrarySearch(nano, catalog, event, **options).run()  # type: ignore[arg-type]
    assert isinstance(result, LibraryResult)
    return result


def test_the_moment_is_named_with_its_video(nano: keye.Keye, catalog: Catalog, film: Film) -> None:
    needle = film.needles[0]
    result = search(nano, catalog, needle.name)
    best = (*result.moments, *result.weaker)[0]
    assert Path(best.file or "").name == "needle.mp4"
    assert best.start == pytest.approx(needle.start, abs=1.0) and best.end == pytest.approx(needle.end, abs=1.0)
    assert len({moment.id for moment in (*result.moments, *result.weaker)}) == len(result.moments) + len(result.weaker)


def test_coverage_says_what_was_searched(nano: keye.Keye, catalog: Catalog) -> None:
    coverage = search(nano, catalog, "the cyan triangle").coverage
    assert (coverage.videos, coverage.searched_videos) == (3, 2)
    assert coverage.searched == pytest.approx(46.0, abs=0.2) and coverage.scored_windows == coverage.windows > 0
    ((file, reason),) = coverage.missing
    assert Path(file).name == "broken.mp4" and reason.startswith("broken.mp4 is not a video")


def test_stored_vectors_rank_before_anything_is_asked(nano: keye.Keye, catalog: Catalog) -> None:
    events = LibrarySearch(nano, catalog, "red", embedder=MeanColors()).run()
    first = next(events)
    events.close()
    assert isinstance(first, MomentsFound) and {Path(moment.file or "").name for moment in first.moments} == {
        "needle.mp4",
        "demo.mp4",
    }


def test_a_stopped_search_returns_what_it_has(nano: keye.Keye, catalog: Catalog) -> None:
    stopped = LibrarySearch(nano, catalog, "the cyan triangle")
    stopped.stop()
    *_, result = stopped.run()
    assert isinstance(result, LibraryResult) and result.stopped
    assert result.coverage.scored_windows < result.coverage.windows


@pytest.mark.parametrize("bound", [{"budget": 1}, {"seconds": 1e-6}])
def test_tokens_and_time_bound_a_search(nano: keye.Keye, catalog: Catalog, bound: dict[str, object]) -> None:
    result = search(nano, catalog, "the cyan triangle", **bound)
    assert result.stopped and result.coverage.close_videos == 0
    assert 0 < result.coverage.scored_windows < result.coverage.windows


def test_an_empty_library_says_what_to_do(nano: keye.Keye, tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="keye library add"):
        search(nano, Catalog(tmp_path), "the cyan triangle")
