"""The parity harness itself: what it records of a step, and which cases it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from keye.cache.sequence import KVCache
from keye.config import load_model_config
from keye.hub import asset
from keye.models.attention import Span
from keye.models.keye import KeyeModel
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.parity import dsa
from tests.support.parity.cases import Case
from tests.support.parity.processor import load_tokenizer


def selections(model: KeyeModel, lengths: list[int]) -> dict[str, Any]:
    """What the harness records of one step over sequences of these lengths, the same tokens in each."""
    ids = torch.cat([torch.arange(length) % 50 for length in lengths])
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    spans, start = [], 0
    for length in lengths:
        spans.append(Span(start, start + length, KVCache(model.config.text.num_hidden_layers)))
        start += length
    got: dict[str, Any] = {}
    with torch.no_grad():
        model(model.embed(ids), positions, dsa._ObservedStep(spans, model, got))
    return got


def test_selections_of_a_step_are_in_the_order_of_its_sequences() -> None:
    """A long sequence, which attends sparsely, before a short one, which attends densely."""
    model = fresh_model(load_model_config(asset("nano")), 0).float()
    topk = model.config.text.sparse.topk
    together = selections(model, [topk + 9, topk - 5])["L0.topk_sorted"]
    alone = [selections(model, [length])["L0.topk_sorted"] for length in (topk + 9, topk - 5)]
    assert torch.equal(together, torch.cat(alone))


def test_an_informative_case_differs_from_one_with_informative_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "vision"
    folder.mkdir()
    meta = {"informative": "info.sdpa.*: of another branch"}
    golden = Path(__file__).parents[1] / "golden"
    stored = next(golden.glob("*/case-*.safetensors"))
    for name, text in (("00", "for text only"), ("01", f"{next(iter(Case(stored.with_suffix('.json')).tensors))}: x")):
        (folder / f"case-{name}.json").write_text(json.dumps(meta | {"informative": text}))
        shutil.copy(stored, folder / f"case-{name}.safetensors")
    assert Case(folder / "case-00.json").is_informative
    assert not Case(folder / "case-01.json").is_informative


def test_the_tokenizer_is_found_above_the_cases(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "keye-vl-8b-preview"
    place.mkdir(parents=True)
    shutil.copy(asset("nano") / "tokenizer.json", place)
    deep = tmp_path / "runs" / "golden"
    deep.mkdir(parents=True)
    assert load_tokenizer(deep).added_tokens["<|im_end|>"] == 1752
