"""Threads of the compiled core: they wait for work between calls, and a forked process has its own."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from keye.ops.cpu.quantized import CpuPacked
from keye.ops.cpu.quantized_trial import random_weight
from keye.ops.quantized import QuantFormat


@pytest.fixture
def work(best_backend) -> tuple[CpuPacked, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(QuantFormat("int4", 64), (2048, 2048), generator)
    torch.set_num_threads(3)
    return CpuPacked.of(best_backend.library(), weight), torch.randn(40, 2048, generator=generator)


def test_several_callers_at_once_get_their_own_results(work) -> None:
    packed, x = work
    wanted = [packed.matmul(part) for part in x.split(5)]
    results: list[list[torch.Tensor]] = [[] for _ in wanted]

    def call(i: int) -> None:
        results[i] += [packed.matmul(x[5 * i : 5 * i + 5]) for _ in range(20)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(wanted))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(out, wanted[i]) for i, outs in enumerate(results) for out in outs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_computes_too(work) -> None:
    packed, x = work
    wanted = packed.matmul(x).numpy().tobytes()
    child = os.fork()
    if child == 0:  # no operation of torch that takes OpenMP's threads: those are gone
        os._exit(0 if packed.matmul(x).numpy().tobytes() == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
