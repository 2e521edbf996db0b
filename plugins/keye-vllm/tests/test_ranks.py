"""Two tensor parallel ranks, with the decoder compiled: the ranks choose the same keys and share the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import keye
from cases import CONVERSATIONS, TOLERANCE, check, greedy
from checkpoints import random_checkpoint
from conftest import StartEngine


@pytest.mark.slow
def test_two_ranks_compiled(tmp_path: Path, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = random_checkpoint(tmp_path / "model")
    engine = start_engine(folder, tensor_parallel_size=2, enforce_eager=False)
    own = keye.load(folder, dtype="float32")
    for messages in CONVERSATIONS.values():
        (output,) = engine.chat(messages, greedy(prompt_logprobs=0), use_tqdm=False)
        assert check(own, messages, output) > 1000 * TOLERANCE
    outputs = engine.chat(list(CONVERSATIONS.values()), greedy(), use_tqdm=False)
    for messages, output in zip(CONVERSATIONS.values(), outputs, strict=True):
        check(own, messages, output)
