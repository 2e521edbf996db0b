"""What is predicted of a request is what the engine takes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import keye
from keye.chat.messages import Message
from keye.engine.request import Finished
from keye.engine.step import SCRATCH, Slice, run_slices
from keye.models.keye import KeyeModel
from keye.planning.estimate import CostQuery, memory_of
from tests.support.engine import Inbox
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> keye.Keye:
    return keye.load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize("tokens", [1, 40, 1000, 1024, 1025, 3000, 4096])
def test_the_predicted_scratch_is_the_most_that_is_reserved(model: keye.Keye, tokens: int) -> None:
    core, ledger = model.core, model.runtime.ledger
    request = model.request([Message("user", ("hello",))], max_tokens=4, ignore_eos=True, deterministic=False)
    prompt = model.runtime.prompts.of_tokens([(7 * number) % 90 + 100 for number in range(tokens)])
    reserved: list[int] = []

    def watch(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        reserved.append(ledger.used(SCRATCH))
        return run_slices(network, slices)

    inbox = Inbox()
    core.add(replace(request, prompt=prompt), inbox)
    core.run_slices = watch
    while not core.is_idle():
        core.step()
    assert isinstance(inbox.events[-1], Finished) and inbox.events[-1].prompt_tokens == tokens
    model.clear_caches()
    predicted = memory_of(model.config, CostQuery(0, (0, 0), tokens, 4), torch.bfloat16, "auto")["scratch"]
    assert predicted == max(reserved)
    assert ledger.accounts() == {}
