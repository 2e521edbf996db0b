"""Memory of a LoRA step on layers of Keye-VL-2.0's width with quantised weights, against the plan.

    python -m benchmarks.qlora_memory [--layers 2] [--tokens 2048] [--quant int4] [--experts] [--keep]

The network has `layers` decoder layers, the embeddings and the head, in the formats of `keye.load(quant=...)`, and no
vision tower (features are cached). Weights are random codes. Two steps are taken: forward, backward, AdamW. Measured is
the largest resident memory during them, above what the process had before the weights were there and after a step of a
tiny model. `--experts` adapts the experts too, `--keep` keeps activations instead of computing layers again. The C
library returns at once what is freed (MALLOC_MMAP_THRESHOLD_), unless `--hoard` leaves it its habits. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch
from torch import nn

from benchmarks.quant_model import fill_with_codes
from keye.config import KeyeConfig, load_model_config
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import replace_layers
from keye.models.quant_fill import quantize_layer
from keye.ops import registry
from keye.quant.layers import QuantizedWeight, pack_weights
from keye.quant.policy import make_policy
from keye.train.config import LoraSettings, StageConfig, TrainConfig
from keye.train.lora import add_lora
from keye.train.losses import token_log_probs
from keye.train.optim import Optimizer, Trained
from keye.train.packed import TreeStep
from keye.train.plan import plan_training

_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


def model_config(layers: int, **fields: int) -> KeyeConfig:
    """2.0 with fewer layers and no vision tower; `fields` of the decoder replace its own."""
    config = load_model_config(asset("configs/2.0"))
    return replace(config, text=replace(config.text, num_hidden_layers=layers, **fields), has_vision=False)


def build(config: KeyeConfig, quant: str) -> KeyeModel:
    """A model of random codes."""
    policy = make_policy(quant)
    with torch.device("meta"):
        model = KeyeModel(config).bfloat16()

        def quantise(name: str, layer: nn.Module) -> nn.Module:
            form = policy.format_of(f"{name}.weight")
            return layer if form is None else quantize_layer(layer, form)

        replace_layers(model, quantise)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            fill_with_codes(module)
    pack_weights(model)
    model.set_elementwise(registry.find_elementwise(model.device, config.text.hidden_size))
    return model.train()


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def prepare(
    config: KeyeConfig, quant: str, settings: LoraSettings, *, checkpointing: bool
) -> tuple[KeyeModel, Optimizer]:
    """A model with pairs, and what trains them."""
    model = build(config, quant)
    lora = add_lora(model, settings)
    model.set_recompute(checkpointing)
    return model, Optimizer([Trained(name, parameter, False, 1e-4) for name, parameter in lora.named.items()])


def take_step(model: KeyeModel, optimizer: Optimizer, tokens: int, learnt: int) -> float:
    """One step on random tokens; the loss."""
    ids = torch.randint(0, model.config.text.vocab_size, (tokens,))
    step = TreeStep(torch.tensor([[0, tokens, -1]]), model.config.text)
    hidden = model(model.embed(ids), torch.arange(tokens).expand(3, -1), step)
    loss = -token_log_probs(model.logits, hidden[-learnt - 1 : -1], ids[-learnt:]).mean()
    loss.backward()
    optimizer.step(1.0)
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--learnt", type=int, default=512)
    parser.add_argument("--quant", choices=["int4", "int8"], default="int4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--hoard", action="store_true")
    arguments = parser.parse_args()
    if not arguments.hoard and _THRESHOLD not in os.environ:  # read when a process begins
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, _THRESHOLD: str(128 * 1024)})
    torch.set_num_threads(1)
    config = model_config(arguments.layers)
    lora_settings = LoraSettings(rank=arguments.rank, experts=arguments.experts)
    stage = StageConfig(name="tune", steps=2, optimizer="adamw")
    run = TrainConfig(model=Path(), output=Path(), stages=(stage,), quant=arguments.quant, lora=lora_settings,
                      checkpointing=not arguments.keep)  # fmt: skip
    plan = plan_training(config, run, stage, tokens=arguments.tokens, visual_tokens=0, learnt=arguments.learnt)
    options = {"checkpointing": run.checkpointing}
    # Code of torch and of the compiled core is resident before anything is measured.
    small = model_config(1, vocab_size=4096, num_experts=16, moe_intermediate_size=64)
    take_step(*prepare(small, arguments.quant, lora_settings, **options), 64, 32)
    gc.collect()
    baseline = status("VmRSS:")
    model, optimizer = prepare(config, arguments.quant, lora_settings, **options)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of filling the weights
    weights = status("VmRSS:") - baseline
    begin, losses = time.process_time(), []
    for _ in range(2):
        losses.append(take_step(model, optimizer, arguments.tokens, arguments.learnt))
    measured = status("VmHWM:") - baseline
    result: dict[str, Any] = {
        "layers": arguments.layers, "tokens": arguments.tokens, "quant": arguments.quant, "rank": arguments.rank,
        "experts": arguments.experts, "hoard": arguments.hoard, "checkpointing": run.checkpointing,
        "trained": plan.trained,
        "planned_mib": round(plan.total / 2**20), "measured_mib": round(measured / 2**20),
        "ratio": round(plan.total / measured, 3), "before_steps_mib": round(weights / 2**20),
        "parts_mib": {name: round(size / 2**20) for name, size in plan.parts.items()},
        "cpu_seconds_a_step": round((time.process_time() - begin) / 2, 1), "flops": plan.flops,
        "loss": [round(loss, 3) for loss in losses],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
