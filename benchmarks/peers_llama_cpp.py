"""llama.cpp on layers of Keye-VL-2.0's width: prefill and decode in CPU time of one thread, what our own int4 is
compared with.

    python -m benchmarks.peers_llama_cpp --json [--layers 4] [--type Q4_K_M] [--contexts 512 4096]

The text of 2.0 without its indexer, as `keye convert --text-only` writes it: layers of noise and the whole head. The
file (1.9 GB for four layers) is written once into --folder. Prefill is the best of ubatch 512 and 2048; decode the
median of steps. Flash attention is left to llama.cpp, keys and values are half precision: its defaults. llama.cpp
comes from `make peers`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale import machine
from keye.config import read_json
from keye.hub import asset
from keye.models.outline import outline
from keye.weights.export import plan_text
from keye.weights.gguf.convert import write_conversion
from keye.weights.gguf.metadata import text_metadata
from tests.peers import install, llama_cpp

UBATCHES = (512, 2048)


@dataclass(frozen=True)
class Noise:
    """A tensor of noise, made when it is read: a source of weights."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    is_readable: bool = True
    place: tuple[str, int] = ("", 0)
    format: None = None

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def part(self, begin: int, end: int) -> Noise:
        return replace(self, shape=(end - begin, *self.shape[1:]))

    def quantized(self) -> None:
        raise AssertionError("noise is in no quantised format")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        is_norm = len(self.shape) == 1
        yield lambda: target.fill_(1) if is_norm else target.normal_(0, self.shape[-1] ** -0.5)


def write_model(path: Path, layers: int, file_type: str) -> None:
    """The text of 2.0 with `layers` layers, as llama.cpp runs it, unless it is there."""
    if path.exists():
        return
    raw = {**read_json(asset("configs/2.0") / "config.json"), "num_hidden_layers": layers}
    sources = {name: Noise(shape) for name, shape in outline(raw).shapes.items()}
    metadata = text_metadata(raw, "qwen3moe")
    tokens = [f"<{i}>" for i in range(raw["vocab_size"])]
    metadata |= {
        "general.architecture": "qwen3moe", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [],
    }  # fmt: skip
    torch.manual_seed(0)
    plan = plan_text(raw, sources, file_type, text_only=True)
    write_conversion(path, plan, metadata)


def measure(path: Path, context: int, steps: int) -> dict[str, Any]:
    """Tokens a second of prefill, and milliseconds of decode steps behind it."""
    tokens = torch.randint(0, 150_000, (context + steps,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill, decode = {}, []
    for ubatch in UBATCHES if context > UBATCHES[0] else UBATCHES[:1]:
        room = context + steps
        with llama_cpp.open_model(path, context=room, ubatch=ubatch, flash="auto", kv="float16", check=False) as model:
            model.step(tokens[:32], logits=False)  # reads the weights from the disk
            model.clear()
            begin = time.process_time()
            model.step(tokens[:context], logits=False)
            prefill[ubatch] = context / (time.process_time() - begin)
            for token in tokens[context:]:
                begin = time.process_time()
                model.step([token])
                decode.append(1e3 * (time.process_time() - begin))
    decode.sort()
    return {
        "prefill_tokens_s": max(prefill.values()), "prefill_by_ubatch": prefill, "decode_ms": decode[len(decode) // 2],
        "decode_fastest_ms": decode[0], "decode_slowest_ms": decode[-1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", action="store_true", help="print JSON; this is the only form there is")
    options = parser.parse_args()
    if reason := install.problem():
        raise SystemExit(f"llama.cpp cannot be had here: {reason}")
    path = options.folder / f"keye-2.0-{options.layers}-layers-{options.type}.gguf"
    write_model(path, options.layers, options.type)
    result = {
        "benchmark": "peers_llama_cpp", "machine": machine(), "layers": options.layers, "type": options.type,
        "bytes": path.stat().st_size,
        "contexts": {context: measure(path, context, options.steps) for context in options.contexts},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
