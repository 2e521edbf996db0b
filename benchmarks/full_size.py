"""The whole geometry of a published model with quantised random weights: built once, then run in this machine's memory.

    nice python -m benchmarks.full_size build 2.0 int4 -o /tmp/keye-2.0-int4       # 16.9 GB, minutes
    python -m benchmarks.full_size run /tmp/keye-2.0-int4 --threads 2

`build` writes codes and scales in the layout of `keye quantize`, shard by shard, under keye's own tokenizer; weights
are random with the variance that keeps activations in range, so that every token chooses its own experts. Free space
is checked first. `run` loads the folder and asks with an image and a video in every prompt, sparse attention on: time
to the first token of a prompt of 512 tokens, prefill and decode at a context of 4,096, the experts that were chosen,
the peak of resident memory. Prints one JSON object. Times count on an idle machine only; those of the CPU
are of all threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import keye
from keye.chat.messages import Medium, Message
from keye.chat.tokenizer import Tokenizer
from keye.config import model_config_from_dict, read_json
from keye.data import frameforge
from keye.engine.request import GenerationRequest
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import replace_layers
from keye.models.quant_fill import quantize_layer
from keye.quant.policy import Policy, make_policy

SHARD_BYTES: Final = 10**9
#: Bytes of disk that must be left free.
SPARE_BYTES: Final = 2 * 10**9
#: Bytes of noise that codes are taken from, from a random place on.
NOISE_BYTES: Final = 1 << 27
#: Matrices whose outputs are added to the residual stream: what they add must stay small over all layers.
_RESIDUAL: Final = ("o_proj", "down_proj", "out_proj", "fc2")
#: Lengths of the prompts, and tokens that are generated after each.
FIRST: Final = 512
CONTEXT: Final = 4096
REPLY: Final = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build_parser = verbs.add_parser("build", help="write a checkpoint")
    build_parser.add_argument("model", choices=["1.5", "2.0"])
    build_parser.add_argument("format", choices=["int4", "int8"])
    build_parser.add_argument("-o", "--output", type=Path, required=True)
    build_parser.add_argument("--layers", type=int, help="fewer layers, to try the command")
    run_parser = verbs.add_parser("run", help="measure a checkpoint")
    run_parser.add_argument("folder", type=Path)
    run_parser.add_argument("--threads", type=int, default=2)
    run_parser.add_argument("--first", type=int, default=FIRST)
    run_parser.add_argument("--context", type=int, default=CONTEXT)
    run_parser.add_argument("--reply", type=int, default=REPLY)
    run_parser.add_argument("--experts", choices=["memory", "disk"], default="memory")
    run_parser.add_argument("--experts-folder", type=Path, help="where experts on disk lie")
    options = parser.parse_args()
    result = build(options) if options.verb == "build" else run(options)
    print(json.dumps(result))


# --------------------------------------------------------------------------------------------------------------------
# Building


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the checkpoint; it appears under its name when it is complete."""
    begin, policy = time.perf_counter(), make_policy(options.format)
    raw = describe(options.model, policy, options.layers)
    tensors = outline(raw, policy)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    output: Path = options.output
    if output.exists():
        sys.exit(f"{output} exists; remove it, or build elsewhere")
    free = shutil.disk_usage(output.parent).free
    if free < total + SPARE_BYTES:
        sys.exit(f"{output.parent} has {free / 1e9:.1f} GB free, but {(total + SPARE_BYTES) / 1e9:.1f} GB are needed")
    draft = output.with_name(f"{output.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        write(draft, raw, tensors, total)
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    seconds = round(time.perf_counter() - begin)
    return {"folder": str(output), "bytes": total, "tensors": len(tensors), "seconds": seconds}


def describe(model: str, policy: Policy, layers: int | None) -> dict[str, Any]:
    """config.json: the published geometry with the token ids of keye-nano, whose tokenizer stands in."""
    raw, nano = dict(read_json(asset(f"configs/{model}") / "config.json")), read_json(asset("nano") / "config.json")
    raw |= {name: value for name, value in nano.items() if name.endswith("token_id")}
    raw.pop("fast_video_token_id", None)
    raw |= {"quantization_config": policy.to_dict(), "num_hidden_layers": layers or raw["num_hidden_layers"]}
    return raw


def outline(raw: dict[str, Any], policy: Policy) -> dict[str, Tensor]:
    """The tensors of the quantised checkpoint on the meta device."""
    with torch.device("meta"):
        model = KeyeModel(model_config_from_dict(raw)).to(torch.bfloat16)

        def quantise(name: str, layer: torch.nn.Module) -> torch.nn.Module:
            form = policy.format_of(f"{name}.weight")
            return layer if form is None else quantize_layer(layer, form)

        replace_layers(model, quantise)
    return dict(model.state_dict())


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor], total: int) -> None:
    """The small files, and the weights in shards with their index."""
    nano = asset("nano")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(nano / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    noise = Noise(Tokenizer.from_file(nano).vocab_size)
    weight_map, shard, size, number = dict[str, str](), dict[str, Tensor](), 0, 1
    count = math.ceil(total / SHARD_BYTES) + 1

    def flush() -> None:
        nonlocal size, number
        name = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size, number = 0, number + 1

    for name, tensor in tensors.items():
        shard[name] = noise.fill(name, tensor)
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Noise:
    """Random weights. Codes are cut from one block of noise at random places: speed does not depend on them. Of the
    head only the rows of the first `tokens` are not zero, so that replies have a text."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._random, self._columns = tokens, np.random.default_rng(0), 0
        raw = self._random.integers(0, 256, NOISE_BYTES, dtype=np.uint8)
        halves = np.arange(16)
        halves[0] = 8  # 1 .. 15 less 8 has the mean 0
        pairs = (halves[:, None] << 4 | halves).astype(np.uint8).reshape(-1)
        self._noise = {torch.int8: torch.from_numpy(raw), torch.uint8: torch.from_numpy(pairs[raw])}

    def fill(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint by its name, shape and dtype; codes come before their scales."""
        own, _, leaf = name.rpartition(".")
        if leaf == "codes":
            self._columns = tensor.shape[-1] * (2 if tensor.dtype == torch.uint8 else 1)
            return self._codes(tensor)
        if leaf == "scales":
            return self._scales(own, tensor)
        numbers = torch.zeros(tensor.shape) if leaf == "bias" else torch.ones(tensor.shape)
        if numbers.dim() > 1:
            numbers.normal_(std=numbers[0].numel() ** -0.5)
        return numbers.to(tensor.dtype)

    def _codes(self, tensor: Tensor) -> Tensor:
        source, out = self._noise[tensor.dtype], torch.empty(tensor.numel(), dtype=torch.uint8)
        for part in out.split(NOISE_BYTES // 2):
            at = int(self._random.integers(0, NOISE_BYTES - part.numel() + 1))
            part.copy_(source[at : at + part.numel()])
        return out.view(tensor.dtype).view(tensor.shape)

    def _scales(self, own: str, tensor: Tensor) -> Tensor:
        """Outputs of a matrix have the variance of its inputs, those that are added to the residual stream less."""
        is_int4 = tensor.shape[-1] > 1
        gain = 0.15 if own.removesuffix(".weight").endswith(_RESIDUAL) else 1.0
        inputs = 1 if ".embed_tokens." in own else self._columns
        scales = torch.full(tensor.shape, gain / ((4.18 if is_int4 else 73.9) * inputs**0.5), dtype=tensor.dtype)
        if own == "lm_head.weight":
            scales[self._tokens :] = 0
        return scales


# --------------------------------------------------------------------------------------------------------------------
# Running


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the folder and measures; the second prompt shares nothing with the first."""
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    model = keye.load(options.folder, experts=options.experts, experts_folder=options.experts_folder)
    loading = time.perf_counter() - begin
    resident = resident_bytes("VmRSS")
    first = measure(model, options.first, 2, seed=1, frames=4)
    long = measure(model, options.context, options.reply + 1, seed=2, frames=32)
    return {
        "folder": str(options.folder), "threads": options.threads, "load_seconds": round(loading, 1),
        "experts": options.experts, "loaded_bytes": resident, "first": first, "long": long, "routing": routing(model),
        "peak_bytes": resident_bytes("VmHWM"),
        "anonymous_bytes": resident_bytes("RssAnon"), "attention": model.runtime.attention,
    }  # fmt: skip


def measure(model: keye.Keye, tokens: int, reply: int, *, seed: int, frames: int) -> dict[str, Any]:
    """One request with a prompt of `tokens`: seconds to its first token, from the files on, and of each further one."""
    request, size = question(model, tokens, reply, seed, frames)
    core, events = model.core, list[Any]()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    task = core.add(request, events.append)
    stamps = list[tuple[int, float, float]]()
    while not core.is_idle():
        if not core.step():
            core.wait_for_work()
        count = sum(len(choice.reply) for choice in task.choices)
        if count and (not stamps or count > stamps[-1][0]):
            stamps.append((count, time.perf_counter() - begin, time.process_time() - cpu_begin))
    finished = next((event for event in events if hasattr(event, "completion_tokens")), None)
    if finished is None:
        sys.exit(f"the request failed: {events[-1]}")
    model.clear_caches()
    seconds = dict(finished.seconds)
    gaps = sorted(later[1] - sooner[1] for sooner, later in pairwise(stamps))
    result = {
        "prompt_tokens": size, "media_tokens": finished.media_tokens, "first_token_seconds": round(stamps[0][1], 2),
        "first_token_cpu_seconds": round(stamps[0][2], 2),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "prefill_tokens_per_second": round(size / seconds["prefill"], 1) if seconds.get("prefill") else None,
    }  # fmt: skip
    if gaps:
        result |= {"generated": stamps[-1][0], "token_seconds": round(gaps[len(gaps) // 2], 4),
                   "tokens_per_second": round(len(gaps) / sum(gaps), 2),
                   "token_cpu_seconds": round((stamps[-1][2] - stamps[0][2]) / len(gaps), 4)}  # fmt: skip
    return result


def question(model: keye.Keye, tokens: int, reply: int, seed: int, frames: int) -> tuple[GenerationRequest, int]:
    """A question about an image and a video, filled up with words to a prompt of `tokens`, and its size."""
    clip = frameforge.make_clip(seed, frames=frames, size=(224, 224))
    pixels = frameforge.render(clip)
    media = (Medium("image", np.ascontiguousarray(pixels[0])), Medium("video", keye.Frames(pixels, clip.timestamps)))

    def request(words: int) -> GenerationRequest:
        message = Message("user", (*media, "when is it?" + " red circle" * (words // 2)))
        return model.request([message], max_tokens=reply, ignore_eos=True, temperature=0.0)

    def size(words: int) -> int:
        return model.measure(request(words).prompt).prompt_tokens  # type: ignore[arg-type]

    words = tokens - size(0)
    if words < 0:
        sys.exit(f"the media take more than {tokens} tokens")
    return request(words), size(words)


def routing(model: keye.Keye) -> dict[str, Any] | None:
    """How many experts the layers use for one prompt: on average, and in the layer with fewest."""
    sparse = model.config.text
    if not sparse.num_experts:
        return None
    request, _ = question(model, FIRST, 1, 3, 4)
    prompt = model.runtime.prompts.lay_out(request.prompt)  # type: ignore[arg-type]
    (result,) = model.engine.generate([prompt], replace(request.params, stop=(), max_tokens=1), experts=True)
    assert result.prompt_experts is not None
    used = [len(result.prompt_experts[:, layer].unique()) for layer in range(result.prompt_experts.shape[1])]
    return {"experts": sparse.num_experts, "used_mean": round(sum(used) / len(used), 1), "used_least": min(used)}


def resident_bytes(name: str) -> int:
    """VmRSS, VmHWM or RssAnon of this process."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
