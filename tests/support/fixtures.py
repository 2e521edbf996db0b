"""A tiny model, short clips, and a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import keye
from keye.data.frameforge import make_clip, write_mp4
from tests.support.films import write_short_film
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model of 2.0."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four videos of eight frames, 112 x 112 pixels."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(4):
        write_mp4(make_clip(seed, frames=8, objects=2, start=0.0, step=0.5), folder / f"{seed}.mp4", (112, 112))
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty seconds in which a red circle is seen from 21 to 23."""
    return write_short_film(tmp_path_factory.mktemp("films") / "film.mp4")


@pytest.fixture(scope="session")
def nano() -> keye.Keye:
    """The packaged model."""
    return keye.load("nano")


@pytest.fixture(scope="session")
def film_index(film: Path, nano: keye.Keye) -> Path:
    """The search index of the film."""
    path = film.with_suffix(".keye")
    nano.find(film, "green cross", index=path, subtitles="none", effort="high", budget=100)
    return path


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster of this machine for the tests of one module."""
    ray = pytest.importorskip("ray", reason="needs the extra: pip install keye[ray]")
    pytest.importorskip("ray.serve", reason="needs the extra: pip install keye[ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests its workers would hardly run
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
