"""One question about a library of 100 hours: with stored vectors of an embedder, and without.

    python -m benchmarks.library --json

Makes one synthetic film, indexes it with keye-nano, and copies film and index until the library holds `--hours`; the
vectors beside the indexes are drawn from seeds, as a text's is. `vectors` is the wall time until ranked places of the
whole library are there, all files in the page cache; `windows_per_second` is how many windows are asked a second
without vectors, in `--threads` threads, `first` the seconds until the best so far is emitted, `share` the part of all
windows that had been asked after `--seconds`. Targets: vectors 0.5 s, 150 windows a second, first 2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray

import keye
from keye.data.frameforge import plan_film, write_film
from keye.library.catalog import Catalog
from keye.library.find import LibraryResult, LibrarySearch
from keye.library.indexing import index_library
from keye.library.vectors import VectorWriter
from keye.moments import FindProgress, MomentsFound


class SeededVectors:
    """Vectors drawn from a seed that advances: a stand-in of the size of CLIP's."""

    name, dim = "seeded", 512

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def embed_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._random.standard_normal((len(frames), self.dim), np.float32)

    def embed_text(self, text: str) -> NDArray[np.float32]:
        return np.random.default_rng(len(text)).standard_normal(self.dim, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--hours", type=float, default=100.0)
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the film that is copied")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of the search without vectors")
    parser.add_argument("--folder", type=Path, help="where the library is made; kept, and used again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="keye-library-") as temporary:
        print(json.dumps(measure(options.folder or Path(temporary), options), indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    model = keye.load("nano")
    catalog = make_library(model, folder, options.minutes, round(options.hours * 60 / options.minutes))
    with_vectors = []
    for _ in range(4):  # the first reads the files
        search = LibrarySearch(model, catalog, "a red circle", embedder=SeededVectors())
        begin, events = time.perf_counter(), search.run()
        assert isinstance(next(events), MomentsFound)
        with_vectors.append(time.perf_counter() - begin)
        events.close()
    search = LibrarySearch(model, catalog, "the red circle", seconds=options.seconds)
    begin, first, done, total, rate = time.perf_counter(), None, 0.0, 0.0, 0.0
    for event in search.run():
        if isinstance(event, MomentsFound) and first is None:
            first = time.perf_counter() - begin
        if isinstance(event, FindProgress) and event.stage == "coarse":
            done, total, rate = event.done, event.total, event.done / (time.perf_counter() - begin)
    assert isinstance(event, LibraryResult)
    entries = catalog.entries()
    return {
        "hours": round(sum(entry.duration or 0 for entry in entries) / 3600, 2), "videos": len(entries),
        "index_bytes": catalog.used_bytes(), "vectors": round(statistics.median(with_vectors[1:]), 3),
        "vectors_first": round(with_vectors[0], 3), "windows": round(total),
        "windows_per_second": round(rate, 1), "first": None if first is None else round(first, 3),
        "share": round(event.coverage.scored_windows / event.coverage.windows, 4), "threads": options.threads,
        "scored_windows": round(done),
    }  # fmt: skip


def make_library(model: keye.Keye, folder: Path, minutes: float, copies: int) -> Catalog:
    """A library of `copies` of one film with their indexes and vectors."""
    films = folder / "films"
    films.mkdir(parents=True, exist_ok=True)
    film = films / "0000.mp4"
    if not film.exists():
        write_film(plan_film(0, minutes=minutes, needles=2), film)
    catalog = Catalog(folder / "library")
    catalog.limit = 1 << 40
    catalog.add_folder(films)
    catalog.scan(now=time.time() + 60)
    for _ in index_library(model, catalog):
        pass
    (source,) = (entry for entry in catalog.entries() if entry.path.name == film.name)
    for number in range(1, copies):
        copy = films / f"{number:04d}.mp4"
        if not copy.exists():
            os.link(film, copy)
    catalog.scan(now=time.time() + 60)
    for number, entry in enumerate(catalog.entries()):
        index = catalog.index_path(entry)
        if not index.exists():
            shutil.copy(catalog.index_path(source), index)
            catalog.update(entry, "indexed", searchable=source.searchable, duration=source.duration)
        if not index.with_suffix(".vectors").exists():
            times = np.arange(0.0, source.duration or 0.0)
            VectorWriter(index, SeededVectors(number)).append(np.zeros((len(times), 1, 1, 3), np.uint8), times.tolist())
    return catalog


if __name__ == "__main__":
    main()
