"""One engine at a time, in this process, on few threads and with little memory."""

from __future__ import annotations

import os

# Read by vLLM and torch when they are imported.
os.environ.update({
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
})  # fmt: skip

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

StartEngine = Callable[..., Any]


@pytest.fixture(scope="module")
def start_engine() -> Iterator[StartEngine]:
    """Starts vLLM with a checkpoint in float32 and small steps; a second engine of a module takes the place of the
    first."""
    from vllm import LLM

    running: list[LLM] = []

    def stop() -> None:
        for engine in running:
            engine.llm_engine.engine_core.shutdown()
        running.clear()
        gc.collect()

    def start(folder: Path, **options: Any) -> LLM:
        stop()
        settings = {"dtype": "float32", "max_model_len": 2048, "max_num_batched_tokens": 64, "max_num_seqs": 4,
                    "enforce_eager": True}  # fmt: skip
        running.append(LLM(str(folder), **{**settings, **options}))
        return running[0]

    yield start
    stop()
