"""Libraries of the compiled core, built once a session into the cache of the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from keye.ops.cpu import build as cpu_build
from keye.ops.cpu.backend import CpuBackend
from keye.ops.cpu.build import EMULATED, VARIANTS

MakeBackend = Callable[..., CpuBackend]


@pytest.fixture(scope="session")
def variant_backend() -> Callable[[str], CpuBackend]:
    """`variant_backend("avx2")`: the backend of one variant; the test is skipped where it cannot run."""

    def make(name: str, masked_up_to: float = 0) -> CpuBackend:
        before = os.environ.get("KEYE_CPU_VARIANT")
        os.environ["KEYE_CPU_VARIANT"] = name
        try:
            status = cpu_build.ready()
        finally:
            os.environ.pop("KEYE_CPU_VARIANT")
            if before is not None:
                os.environ["KEYE_CPU_VARIANT"] = before
        missing = next(v.needs for v in (*VARIANTS, EMULATED) if v.name == name) - cpu_build.processor_flags()
        if missing or cpu_build.compiler() is None:
            pytest.skip(status.note)
        assert status.library is not None, status.note
        return CpuBackend(status.library, masked_up_to)

    return make


#: Building takes seconds. What these do, `avx512bf16` and `avx2` do too, with float32.
_SLOW = {"avx512", "avx512vnni", "avxvnni"}


@pytest.fixture(
    params=[
        pytest.param(variant.name, marks=[pytest.mark.slow] if variant.name in _SLOW else [])
        for variant in (*VARIANTS, EMULATED)
    ]
)
def backend(request: pytest.FixtureRequest, variant_backend: MakeBackend) -> CpuBackend:
    """Each variant that this processor can run; sets are never applied as masks unless a test asks for it."""
    return variant_backend(request.param)


@pytest.fixture
def best_backend(variant_backend: MakeBackend) -> CpuBackend:
    """The best variant of this processor."""
    runnable = cpu_build.runnable()
    if not runnable:
        pytest.skip("no variant runs on this processor")
    return variant_backend(runnable[0].name)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
