"""`keye finetune` from files to answers: checkpoints in the layout of each release with the official tokenizer learn 50
samples of texts, images and videos, and answer them exactly after they were loaded again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import keye
from keye.chat.messages import Message
from keye.cli import main
from keye.config import load_model_config
from keye.data.samples import Sample
from keye.data.sources import DataSet, open_samples
from keye.models.keye import KeyeModel
from keye.models.load import load_model
from keye.train.config import LoraSettings
from keye.train.lora import add_lora, save_adapter
from tests.support.checkpoints import official_checkpoint, write_samples

#: About a minute of processor time each.
LONG = pytest.mark.skipif(not os.environ.get("KEYE_LONG_TESTS"), reason="set KEYE_LONG_TESTS=1: minutes each")
pytestmark = [pytest.mark.slow, LONG]
Shared = Callable[[str], Path]

#: The way of training, with what is as good as certain to learn so few samples by heart.
LORA = ("--lora-rank", 32, "--learning-rate", 0.012, "--max-steps", 64)
FULL = ("--method", "full", "--learning-rate", 0.004, "--max-steps", 64)
EXPERTS = (*LORA, "--lora-experts")
CASES = {
    "preview-lora": ("preview", LORA), "1.5-lora": ("1.5", LORA), "2.0-lora": ("2.0", EXPERTS),
    "2.0-int8": ("2.0", (*EXPERTS, "--quant", "int8")), "2.0-int4": ("2.0", (*EXPERTS, "--quant", "int4")),
    "preview-full": ("preview", FULL), "1.5-full": ("1.5", FULL), "2.0-full": ("2.0", FULL),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def tuned(
    request: pytest.FixtureRequest, data: Path, shared: Shared, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, keye.Keye]:
    """The output folder, and the engine with what was trained."""
    release, flags = request.param
    folder = tmp_path_factory.mktemp("tuned")
    model = official_checkpoint(release, folder / "model", shared)
    out = folder / "out"
    words = ["finetune", model, data, "-o", out, "--lr-schedule", "linear", "--warmup-steps", 2, "--samples", 1, *flags]
    assert main([str(word) for word in words]) == 0
    if "full" in flags:
        return out, keye.load(out)
    quant = flags[-1] if "--quant" in flags else None
    return out, keye.load(model, quant=quant, adapters={"tuned": out}, adapter="tuned")


def reply(model: keye.Keye, messages: Sequence[Message]) -> str:
    return model.chat(messages, temperature=0, max_tokens=8).text


def samples_of(data: Path) -> list[Sample]:
    return sorted(open_samples([DataSet(data)], seed=0, epochs=1.0), key=lambda sample: sample.place.line)


def test_all_samples_are_learnt(tuned: tuple[Path, keye.Keye], data: Path) -> None:
    out, model = tuned
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in log if "loss" in record][-1] < 0.05
    samples = samples_of(data)
    assert len(samples) == 50
    wrong = [s.place for s in samples if reply(model, s.messages[:-1]) != "".join(map(str, s.messages[-1].parts))]
    assert wrong == []
    assert (out / "report.html").is_file()


def test_three_videos_of_unequal_length_in_one_sample_llama_factory_10608(
    tuned: tuple[Path, keye.Keye], data: Path
) -> None:
    """LLaMA-Factory's issue 10608: tokens and features of several videos of different lengths do not match there."""
    _, model = tuned
    *_, sample = samples_of(data)
    frames = [plan["frames"] for plan in model.measure(model.render(sample.messages[:-1])).media]
    assert len(frames) == 3 and len(set(frames)) == 3
    assert reply(model, sample.messages[:-1]) == "the third"


@pytest.mark.parametrize("release", ["preview", "1.5", "2.0"])
def test_a_zero_adapter_changes_no_bit(release: str, data: Path, shared: Shared, tmp_path: Path) -> None:
    folder = official_checkpoint(release, tmp_path / "model", shared)
    config = load_model_config(folder)
    base: KeyeModel = load_model(folder, config)[0]
    settings = LoraSettings(targets=("all-linear", "tower", "projector"), experts=release == "2.0")
    save_adapter(add_lora(base, settings, seed=0), tmp_path / "zero")
    model = keye.load(folder, adapters={"zero": tmp_path / "zero"})
    for sample in samples_of(data)[-6:]:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "logprobs": 3}
        plain = model.chat(sample.messages[:-1], **options)
        adapted = model.chat(sample.messages[:-1], adapter="zero", **options)
        assert (plain.text, plain.logprobs) == (adapted.text, adapted.logprobs)
