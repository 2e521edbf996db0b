"""What a training step costs: seconds by part, and the share that its matrix products have of the machine's rate.

Two cases, one process, fresh weights in bfloat16. `nano`: keye-nano, 4 clips of 16 frames with 16 questions each, the
vision tower frozen. `wide`: two layers of Keye-VL 2.0's width with 16 experts, one sequence of `--length` tokens; no
head.

* `forward_s`, `backward_s`, `optimizer_s`: CPU seconds over all threads, the median of `--steps` steps after two that
  warm up; `frames_per_second` a core in the case `nano`;
* `--elementwise`: small operations with gradients by the compiled core, as a run has them; plain torch; or compiled by
  torch, as a run without the core has them with `fused = true`;
* `gflop`: operations of matrix products in one step. Those of attention count pairs of queries and keys that attend:
  two products forward, four backward, and of the indexer one over all pairs and two over chosen ones;
* `gemm_share`: `gflop` in the forward and backward pass a second, by the rate of products of bfloat16 matrices with
  2,048 rows and columns (`gemm_gflops`, by CPU seconds of one thread), measured between the steps.

Prints JSON. Run:
    python benchmarks/train_step.py [--case nano] [--attention sparse] [--elementwise core] [--threads 1] [--steps 5]
    python benchmarks/train_step.py --case wide [--length 8192] --steps 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from keye.config import KeyeConfig, TextConfig, load_model_config, model_config_from_dict
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.ops.elementwise import PLAIN, Elementwise, compile_elementwise
from keye.ops.registry import find_training_elementwise
from keye.train.config import TrainMode
from keye.train.optim import Optimizer, Trained, mark_trainable
from keye.train.packed import TreeStep, link_segments
from keye.train.recipe import move_batch
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import Mix, NanoStage, NanoTable
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.recipes.nano.recipe import NanoRecipe

NANO = Path(__file__).parents[1] / "configs" / "nano"
FRAMES, CLIPS = 16, 4
WARM_UP = 2


def count_attention(segments: Tensor, text: TextConfig, mode: TrainMode) -> float:
    """Operations of attention in one layer, forward and backward."""
    sparse, pairs, chosen = text.sparse, 0, 0
    topk = sparse.topk if sparse is not None and mode == "sparse" else None
    for segment in link_segments(tuple(map(tuple, segments.tolist()))):  # type: ignore[arg-type]
        seen = range(segment.first + 1, segment.length + 1)
        pairs += sum(seen)
        chosen += sum(seen) if topk is None else sum(min(count, topk) for count in seen)
    flops = 2 * 6 * text.num_attention_heads * text.head_dim * chosen
    if sparse is not None and mode != "dense":
        flops += 2 * sparse.indexer_num_heads * sparse.indexer_head_dim * (pairs + 2 * chosen)
    return float(flops)


class Nano:
    """The step of keye-nano's recipe."""

    def __init__(self, mode: TrainMode, length: int) -> None:
        table = NanoTable(mix=(Mix(frames=FRAMES, clips=CLIPS, questions=16),))
        self.stage = NanoStage(name="step", steps=1, attention=mode, nano=table)
        self.model = fresh_model(load_model_config(NANO), 0).bfloat16().train()
        self.trained = mark_trainable(self.model, self.stage)
        self.objective = NanoRecipe().make_objective(self.stage, self.model)

    def make(self, number: int) -> Any:
        """The batch of a step."""
        return move_batch(make_batch(self.stage, NANO, number), self.model.device)

    def loss(self, batch: Any) -> Tensor:
        return self.objective.loss(self.model, batch, 1.0)

    def segments(self, batch: Any) -> Tensor:
        segments: Tensor = batch.segments
        return segments


class Wide:
    """Two layers of 2.0's width over one sequence."""

    def __init__(self, mode: TrainMode, length: int) -> None:
        self.model, self.mode, self.length = random_model(wide_config()), mode, length
        self.trained = [Trained(name, p, False, 1e-4) for name, p in self.model.model.layers.named_parameters()]

    def make(self, number: int) -> Any:
        """Inputs like those behind a first layer: neighbours are alike, as the pixels of a video are."""
        torch.manual_seed(number)
        x = torch.randn(self.length, self.model.config.text.hidden_size)
        return x.bfloat16(), torch.arange(self.length).expand(3, -1)

    def loss(self, batch: Any) -> Tensor:
        x, positions = batch
        step = TreeStep(self.segments(batch), self.model.config.text, self.mode)
        loss = self.model(x, positions, step).float().square().mean() + step.balance()
        return loss + step.kl() if self.mode != "dense" else loss

    def segments(self, batch: Any) -> Tensor:
        return torch.tensor([[0, self.length, -1]])


def wide_config(experts: int = 16) -> KeyeConfig:
    """Keye-VL 2.0 with two layers, the experts of a layer, and nano's vocabulary."""
    raw, nano = (json.loads((folder / "config.json").read_text()) for folder in (asset("configs/2.0"), NANO))
    own = {name: value for name, value in nano.items() if name.endswith("_token_id") or name == "vocab_size"}
    return model_config_from_dict({**raw, **own, "num_hidden_layers": 2, "num_experts": experts})


def random_model(config: KeyeConfig) -> KeyeModel:
    """Weights in bfloat16."""
    with torch.device("meta"):
        model = KeyeModel(config)
    model = model.bfloat16().to_empty(device="cpu").train()
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model


def gemm_rate(size: int = 2048) -> float:
    """Operations of products of bfloat16 matrices in a CPU second."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    return 2 * size**3 / min(spent(lambda: a @ b)[0] for _ in range(8))


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def measure(case: Nano | Wide, mode: TrainMode, steps: int) -> dict[str, Any]:
    """The figures of a case."""
    optimizer, rows, rates, flops = Optimizer(case.trained), list[tuple[float, ...]](), list[float](), 0.0
    for number in range(WARM_UP + steps):
        batch = case.make(number)
        if number == 0:
            text = case.model.config.text
            with FlopCounterMode(display=False) as counter:
                case.loss(batch).backward()
            flops = counter.get_total_flops() + text.num_hidden_layers * count_attention(
                case.segments(batch), text, mode
            )
            case.model.zero_grad(set_to_none=True)
            continue
        rates.append(gemm_rate())
        forward, loss = spent(lambda batch=batch: case.loss(batch))  # type: ignore[misc]
        backward, _ = spent(loss.backward)
        update, _ = spent(lambda: optimizer.step(1.0))
        rows.append((forward, backward, update))
    forward, backward, update = (statistics.median(column) for column in zip(*rows[WARM_UP - 1 :], strict=True))
    rate = statistics.median(rates)
    figures = {
        "forward_s": round(forward, 3), "backward_s": round(backward, 3), "optimizer_s": round(update, 3),
        "gflop": round(flops / 1e9, 1), "gemm_gflops": round(rate / 1e9),
        "gemm_share": round(flops / (forward + backward) / rate, 3),
    }  # fmt: skip
    if isinstance(case, Nano):
        figures["frames_per_second"] = round(CLIPS * FRAMES / (forward + backward + update), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("nano", "wide"), default="nano")
    parser.add_argument("--attention", choices=("dense", "warmup", "sparse"), default="sparse")
    parser.add_argument("--elementwise", choices=("core", "plain", "fused"), default="core")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the case wide")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = (Nano if arguments.case == "nano" else Wide)(arguments.attention, arguments.length)
    width = case.model.config.text.hidden_size
    case.model.set_elementwise(find_training_elementwise(case.model.device, width))  # as the loop does
    width = case.model.config.text.hidden_size
    choices: dict[str, Callable[[torch.device], Elementwise | None]] = {
        "core": lambda device: find_training_elementwise(device, width), "plain": lambda device: PLAIN,
        "fused": compile_elementwise,
    }  # fmt: skip
    elementwise = choices[arguments.elementwise](torch.device("cpu"))
    if elementwise is None:
        parser.error("no C++ compiler works here, which --elementwise fused needs")
    case.model.set_elementwise(elementwise)
    settings = {name: getattr(arguments, name) for name in ("case", "attention", "elementwise", "threads")}
    print(json.dumps({**settings, **measure(case, arguments.attention, arguments.steps)}, indent=2))


if __name__ == "__main__":
    main()
