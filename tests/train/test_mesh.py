"""Runs of several processes have the losses of one with the same batches, whichever way the model is divided."""

from pathlib import Path

import pytest

from keye.config import ConfigError
from keye.train.config import ParallelSettings
from keye.train.mesh import check_sizes
from tests.support.distributed import largest_difference, read_log, text_run, text_stage, torchrun, train_text

SHARDED = ParallelSettings(shard=True)


def test_two_processes_that_share_the_weights_have_the_losses_of_one(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, trains="all", attention="sparse", optimizer="adamw")
    alone = train_text(text_run(tmp_path, "one", stage))
    shared = train_text(text_run(tmp_path, "two", stage, processes=2, parallel=SHARDED))
    assert len(alone) == 50 and alone[-1]["loss"] < alone[0]["loss"]
    assert largest_difference(alone, shared) < 1e-5
    assert largest_difference(alone, shared, "grad_norm") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("shard", [False, True])
def test_torchrun_has_the_losses_of_one_process(tmp_path: Path, processes, dtype, tolerance, shard) -> None:
    stage = text_stage(tmp_path, trains="all", attention="sparse")
    alone = train_text(text_run(tmp_path, "one", stage, dtype=dtype))
    config = text_run(tmp_path, "many", stage, dtype=dtype, parallel=ParallelSettings(shard=shard))
    result = torchrun(config, processes)
    assert result.returncode == 0, result.stderr
    assert largest_difference(alone, read_log(config.output)) < tolerance


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"parallel.context is 3, which does not divide the 4 processes"):
        check_sizes(ParallelSettings(context=3), 4)
