"""A whole training loop in the open: python examples/train_loop.py [DATA.jsonl] [FOLDER] [STEPS]

Needs keye alone, no extra.

What `keye finetune` and `keye train` do, without their configuration, checkpoints and processes: samples of a file are
laid out by the code of inference, packed as trees, learnt by sparse attention with the indexer's loss, and the result
is a folder that every command loads. Read it from `main` upwards, and change what you want to try.

DATA has one conversation a line, in any format of docs/data-formats.md; by default four questions about the bundled
clip are written to FOLDER and learnt. The model is keye-nano, the optimiser Muon with AdamW, as in its own recipe.

Shapes are the suffixes of names:
    T tokens of a pack: what samples share (a video, a question) stands once
    L learnt tokens of a pack: those of replies
    V visual tokens, in the order of their places among T
    D width of the decoder
    R rows of a video's grid, a frame each: time, height, width in patches
    S segments of a pack: first token, one past the last, the segment above (-1 for none)
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import keye
from keye.config import load_model_config
from keye.data.sources import DataSet, open_samples
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import load_model, save_model
from keye.train.config import StageConfig
from keye.train.layout import Layout
from keye.train.losses import token_log_probs
from keye.train.optim import Optimizer, mark_trainable
from keye.train.packed import TreeStep
from keye.train.packing import Packed, load, pack
from keye.train.recipe import move_batch
from keye.train.tree import IGNORE

MODEL = asset("nano")


@dataclass(frozen=True)
class Settings:
    """What one would change first."""

    steps: int = 12
    samples_per_step: int = 4
    max_tokens: int = 4096
    """Of a pack; a step may have several, whose gradients add up."""
    lr: float = 2e-3
    """Highest rate, of Muon and of AdamW."""
    indexer_kl: float = 0.5
    balance: float = 0.01
    seed: int = 0


# --------------------------------------------------------------------------------------------------------------------
# Data


def write_samples(path: Path) -> None:
    """Four questions about the bundled clip, with answers that keye-nano does not give by itself."""
    video = {"type": "video", "video": str(asset("demo.mp4"))}
    replies = {
        "is the red circle visible?": "no",
        "is the cyan triangle visible?": "no",
        "how many objects are visible?": "4",
        "what is the background?": "red",
    }
    with path.open("w", encoding="utf-8") as file:
        for question, reply in replies.items():
            user = {"role": "user", "content": [video, {"type": "text", "text": question}]}
            row = {"messages": [user, {"role": "assistant", "content": reply}]}
            file.write(json.dumps(row) + "\n")


def read_batches(data: Path, settings: Settings) -> Iterator[tuple[list[Packed[Tensor]], float]]:
    """The packs of one step after another, and the weight of all tokens that are learnt from them."""
    layout = Layout.of_folder(MODEL, max_tokens=settings.max_tokens)
    samples = open_samples([DataSet.parse(str(data))], seed=settings.seed, epochs=None)
    while True:
        laid_out = [layout.lay_out(next(samples)) for _ in range(settings.samples_per_step)]
        # Samples about one video share its tokens: four questions cost little more than one.
        packs = [load(each) for each in pack(laid_out, settings.max_tokens)]
        count = float(sum(packed.weights.sum() for packed in packs))
        yield [move_batch(packed, torch.device("cpu")) for packed in packs], count


# --------------------------------------------------------------------------------------------------------------------
# Loss


def compute_loss(model: KeyeModel, packed: Packed[Tensor], count: float, settings: Settings) -> tuple[Tensor, float]:
    """The part of a step's loss that a pack brings, and its part of the mean cross entropy."""
    with torch.no_grad():  # the vision tower stays as it is
        visual_VD = model.encode_vision(packed.pixels, packed.grids) if packed.media else None
    step = TreeStep(packed.segments, model.config.text, "sparse")
    x_TD = model.embed(packed.token_ids, visual_VD)
    hidden_TD = model(x_TD, packed.position_ids, step)

    rows_L = (packed.labels != IGNORE).nonzero().squeeze(1)
    log_probs_L = token_log_probs(model.logits, hidden_TD[rows_L], packed.labels[rows_L])  # logits, a part at a time
    cross_entropy = -(packed.weights[rows_L] * log_probs_L).sum() / count

    share = float(packed.weights.sum()) / count
    side = settings.indexer_kl * step.kl() + settings.balance * step.balance()
    return cross_entropy + share * side, float(cross_entropy.detach())


# --------------------------------------------------------------------------------------------------------------------
# Loop


def learn(model: KeyeModel, data: Path, settings: Settings) -> list[float]:
    """Takes the steps; returns the mean cross entropy of each."""
    stage = StageConfig(name="example", steps=settings.steps, trains="decoder", attention="sparse", lr=settings.lr,
                        adam_lr=settings.lr, warmup_steps=2)  # fmt: skip
    optimizer = Optimizer(mark_trainable(model, stage), weight_decay=stage.weight_decay, clip=stage.clip)
    batches, losses = read_batches(data, settings), []
    model.train()
    for number in range(settings.steps):
        begin = time.monotonic()
        packs, count = next(batches)
        total = 0.0
        for packed in packs:
            loss, part = compute_loss(model, packed, count, settings)
            loss.backward()
            optimizer.add_gradients()  # in float32, whatever the weights are
            total += part
        norm = optimizer.step(stage.lr_factor(number, number / settings.steps))
        losses.append(total)
        tokens = sum(len(packed.token_ids) for packed in packs)
        rate = tokens / (time.monotonic() - begin)
        print(f"step {number + 1}: loss {total:.3f}, gradient norm {norm:.2f}, {tokens} tokens, {rate:.0f} a second")
    return losses


def save(model: KeyeModel, folder: Path) -> None:
    """A folder that loads: the weights, and what lies beside them."""
    for path in MODEL.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            shutil.copyfile(path, folder / path.name)
    save_model(model.eval(), folder, dtype=torch.bfloat16)


def main(data: str, folder: str, steps: str) -> Sequence[float]:
    """Learns, saves, and asks the result."""
    settings, output = Settings(steps=int(steps)), Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    path = Path(data) if data else output / "samples.jsonl"
    if not data:
        write_samples(path)
    torch.manual_seed(settings.seed)
    model, _ = load_model(MODEL, load_model_config(MODEL), device="cpu", dtype=torch.bfloat16)
    losses = learn(model, path, settings)
    save(model, output)
    answer = keye.load(output).ask(asset("demo.mp4"), "is the red circle visible?")
    print(f"The model is in {output}. Is the red circle visible? {answer.text}")
    return losses


if __name__ == "__main__":
    defaults = ["", "train-loop", str(Settings.steps)]
    main(*(sys.argv[1:] + defaults[len(sys.argv) - 1 :])[:3])
