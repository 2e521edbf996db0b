"""Indexing the videos of a library: states, files that cannot be read, the bound, and a killed process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keye
from keye.errors import KeyeError
from keye.hub import asset
from keye.library.catalog import Catalog
from keye.library.indexing import index_library, searchable_until
from keye.library.vectors import read_vectors
from keye.moments import SeenSpan
from tests.library.test_vectors import MeanColors

LATER = 4e9


@pytest.fixture(scope="module")
def nano() -> keye.Keye:
    return keye.load("nano")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(asset("demo.mp4"), films / "a.mp4")
    (films / "broken.mp4").write_bytes(asset("demo.mp4").read_bytes()[:3000])
    catalog = Catalog(tmp_path / "library")
    catalog.add_folder(films)
    catalog.scan(now=LATER)
    return catalog


def states(catalog: Catalog) -> dict[str, str]:
    return {entry.path.name: entry.state for entry in catalog.entries()}


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_indexed(nano: keye.Keye, catalog: Catalog) -> None:
    events = list(index_library(nano, catalog, embedder=MeanColors()))
    assert states(catalog) == {"a.mp4": "indexed", "broken.mp4": "failed"}
    indexed, broken = catalog.entries()
    assert broken.reason is not None and broken.reason.startswith("broken.mp4 is not a video")
    assert indexed.searchable == pytest.approx(16.0) and indexed.bytes > 0
    assert any(event.progress is not None and event.entry.id == indexed.id for event in events)
    stored = read_vectors(catalog.index_path(indexed))
    assert stored is not None and stored.dim == 3 and np.diff(np.sort(stored.times)).max() <= 1.01


def test_the_bound_ends_the_work_and_keeps_the_rest_waiting(nano: keye.Keye, catalog: Catalog) -> None:
    catalog.limit = 1
    (catalog.indexes / "0.keye").write_bytes(b"xx")
    with pytest.raises(KeyeError, match="higher limit"):
        list(index_library(nano, catalog))
    assert set(states(catalog).values()) == {"discovered"}


def test_one_process_indexes_at_a_time(nano: keye.Keye, catalog: Catalog) -> None:
    with catalog.working(), pytest.raises(KeyeError, match="another process"):
        list(index_library(nano, Catalog(catalog.folder)))


def test_closing_leaves_the_video_to_be_continued(nano: keye.Keye, catalog: Catalog) -> None:
    work = index_library(nano, catalog)
    next(work)
    work.close()
    assert states(catalog)["a.mp4"] == "discovered"
    list(index_library(nano, catalog))
    assert states(catalog)["a.mp4"] == "indexed"


KILLED = """
import os, sys
from pathlib import Path
import keye
from keye.library.catalog import Catalog
from keye.library.indexing import index_library
for event in index_library(keye.load("nano"), Catalog(Path(sys.argv[1]))):
    if event.progress is not None and event.progress.done > 0:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing(nano: keye.Keye, catalog: Catalog) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(catalog.folder)], env=os.environ, check=False)
    assert ended.returncode == -9 and states(catalog)["a.mp4"] == "indexing"
    list(index_library(nano, catalog))
    assert states(catalog) == {"a.mp4": "indexed", "broken.mp4": "failed"}


@pytest.mark.parametrize(
    ("spans", "until"),
    [([], 0.0), ([(0, 10)], 10.0), ([(0, 10), (10, 20)], 20.0), ([(5, 9)], 0.0), ([(0, 10), (15, 20)], 10.0)],
)
def test_searchable_ends_at_the_first_gap(spans: list[Any], until: float) -> None:
    assert searchable_until([SeenSpan(start, end, 1.0) for start, end in spans]) == until
