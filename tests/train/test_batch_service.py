"""Batches that a decode service makes are those that a process of the run's own makes."""

from pathlib import Path

import pytest

from keye.errors import KeyeError
from keye.train.batches import BatchService
from keye.train.recipes.nano.batches import make_batch
from tests.support.tiny import NANO
from tests.support.training import LANGUAGE, VISION, a_run, assert_same, assert_same_weights, train_nano


def test_batches_of_a_service() -> None:
    service = BatchService("local:1")
    try:
        futures = [service.submit(make_batch, LANGUAGE, NANO, seed) for seed in range(3)]
        for seed, future in enumerate(futures):
            assert_same(future.result(60), make_batch(LANGUAGE, NANO, seed))
    finally:
        service.close()


@pytest.mark.slow
def test_a_run_on_a_service_ends_with_the_same_weights(tmp_path: Path) -> None:
    usual = train_nano(a_run(tmp_path, "usual", VISION, LANGUAGE))
    served = train_nano(a_run(tmp_path, "served", VISION, LANGUAGE), decode="local:2")
    assert_same_weights(usual, served)


def test_an_address_that_is_none_leaves_nothing_behind(tmp_path: Path) -> None:
    config = a_run(tmp_path, "none", LANGUAGE)
    with pytest.raises(KeyeError, match="'nowhere' is not an address of a decode service"):
        train_nano(config, decode="nowhere")
    assert not config.output.exists()
