"""Whether training and inference agree: the keys that both select, and the log-probabilities that both give.

keye-nano's weights in bfloat16 and FrameForge clips of `--frames` frames, each with 16 questions in one pack:

* `rows_equal`: share of query rows, over all layers, whose set of keys in training is that of inference, for the same
  hidden states; inference computes each question with its video as a sequence of its own, from a KV cache;
* `logprob_mean`, `logprob_p99`, `logprob_max`: absolute differences of the log-probabilities of reply tokens, the
  trainer's pack against `Engine.score`, until `--tokens` tokens were compared. With `--deterministic` the engine
  computes a prompt in one way whatever else it computes.

`--adapter` trains a LoRA of random numbers on everything that takes one, experts, router, indexer and vision tower
included, and compares with an engine that has loaded it from its files; its scale (1.375) is not a power of two.
`--quant` quantises the base.

Prints JSON. Run:
    python -m benchmarks.train_selection [--frames 32] [--tokens 10000] [--adapter] [--quant int8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import keye
from keye.cache.sequence import KVCache
from keye.chat.messages import Medium, Message
from keye.data.frameforge import make_clip, questions, render
from keye.data.samples import Place, Sample
from keye.engine.engine import Engine, TokenPrompt
from keye.engine.media import Frames
from keye.hub import asset
from keye.models.adapters import Adapter
from keye.models.attention import Indexer
from keye.models.keye import KeyeModel
from keye.ops import registry
from keye.ops.backend import Stretch
from keye.ops.tree import Segment, select_keys
from keye.train.config import LoraSettings
from keye.train.features import encode_media
from keye.train.layout import Layout
from keye.train.lora import LoraParameters, add_lora, save_adapter
from keye.train.packed import TreeStep
from keye.train.packing import Pack, Packed, load, pack
from keye.train.recipe import move_batch
from keye.train.tree import IGNORE

QUESTIONS = 16
ADAPTER = "random"
EVERYTHING = LoraSettings(
    rank=8, alpha=11.0, targets=("all-linear", "router", "indexer", "head", "vision"), experts=True
)


def make_packs(layout: Layout, frames: int) -> Iterator[Pack]:
    """Packs of one clip each, without end."""
    seed = 0
    while True:
        clip, rng = make_clip(seed, frames=frames, split="test"), random.Random(seed)
        video = Medium("video", Frames(render(clip), clip.timestamps))
        samples = [
            Sample((Message("user", (video, item.text)), Message("assistant", (item.answer,))), (False, True),
                   Place("clip", seed))
            for item in questions(clip, rng, QUESTIONS)
        ]  # fmt: skip
        if samples:
            yield pack([layout.lay_out(sample) for sample in samples], 1 << 20)[0]
        seed += 1


class Trainer:
    """The forward pass of a training step, and what its indexers read."""

    def __init__(self, model: KeyeModel) -> None:
        self.model = model.train()
        width = model.config.text.hidden_size
        model.set_elementwise(registry.find_training_elementwise(model.device, width))  # as the loop does
        self.indexers = [module for module in model.modules() if isinstance(module, Indexer)]
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        for indexer in self.indexers:
            indexer.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        self.inputs.append(inputs)

    def log_probs(self, packed: Packed[Tensor]) -> tuple[Tensor, TreeStep]:
        """Of every token after every token of a pack: float32 [T, V]."""
        self.inputs.clear()
        step = TreeStep(packed.segments, self.model.config.text, "sparse")
        visual = encode_media(self.model, packed)
        hidden = self.model(self.model.embed(packed.token_ids, visual), packed.position_ids, step)
        return self.model.logits(hidden).log_softmax(-1).detach(), step


def count_equal_rows(
    trainer: Trainer, model: KeyeModel, adapter: Adapter | None, segments: tuple[Segment, ...]
) -> tuple[int, int]:
    """Rows of all layers whose sets are those of an engine's `model`, and all rows."""
    text, equal, total = trainer.model.config.text, 0, 0
    assert text.sparse is not None
    topk, others = text.sparse.topk, [module for module in model.modules() if isinstance(module, Indexer)]
    for indexer, other, (x, cos, sin) in zip(trainer.indexers, others, list(trainer.inputs), strict=True):
        k = x.new_zeros(len(x), text.num_key_value_heads, text.head_dim)
        q = x.new_zeros(len(x), text.num_attention_heads, text.head_dim)
        index = indexer(x, cos, sin)
        ours = select_keys(q, k, index.q, index.k, index.gate, segments, topk)
        for segment in segments:
            rows = segment.rows(0, segment.length, x.device)
            with model.adapter_rows.use_for_all(adapter):
                wanted = infer_sets(other, x[rows], cos[rows], sin[rows], q[rows], k[rows], topk)[segment.first :]
            wanted = torch.where(wanted >= 0, rows[wanted.clamp_min(0).long()], -1)
            mine = ours[segment.start : segment.stop]
            missing = wanted.shape[1] - mine.shape[1]
            mine = torch.nn.functional.pad(mine, (0, missing), value=-1)
            equal += int((mine.sort(1).values == wanted.sort(1).values).all(1).sum())
            total += len(mine)
    return equal, total


@torch.no_grad()
def infer_sets(indexer: Indexer, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, topk: int) -> Tensor:
    """The sets of one sequence as inference selects them: positions int32 [T, topk]."""
    index, cache, length = indexer(x, cos, sin), KVCache(1), len(x)
    cache.append(0, {"k": k, "v": k, "indexer_k": index.k.unsqueeze(1)})
    stretch = Stretch(
        0, length, 0, rows=lambda positions: (cache.read(0, "k", positions), cache.read(0, "v", positions)),
        key_tiles=lambda start, stop: cache.read_range(0, "indexer_k", start, stop).squeeze(1),
        blocks=cache.layer_blocks(0),
    )  # fmt: skip
    sets = torch.full((length, topk), -1, dtype=torch.int32)
    registry.select_keys(q, index.q, index.gate, [stretch], sets)
    return sets


def log_prob_differences(
    engine: Engine, adapter: str | None, full: Pack, packed: Packed[Tensor], ours: Tensor, step: TreeStep, *,
    deterministic: bool,
) -> Tensor:  # fmt: skip
    """Of the learnt tokens of all segments."""
    differences = []
    for (branch, _), segment in zip(full.tree.branches(), step.segments, strict=True):
        rows = segment.rows(0, segment.length, ours.device)
        labels = packed.labels[rows]
        learnt = segment.first + (labels[segment.first :] != IGNORE).nonzero().squeeze(1)
        if len(learnt):
            ids = [*packed.token_ids[rows].tolist(), int(labels[-1])]
            prompt = TokenPrompt(ids, branch.path.media)
            (scores,) = engine.score([prompt], deterministic=deterministic, adapter=adapter)
            differences.append((ours[rows[learnt], labels[learnt]] - scores.logprobs[learnt]).abs())
    return torch.cat(differences)


def add_random_lora(model: KeyeModel) -> LoraParameters:
    """On everything, with numbers in place of the zeros that training begins with."""
    lora, generator = add_lora(model, EVERYTHING), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pair in lora.pairs.values():
            pair.B.copy_(0.05 * torch.randn(pair.B.shape, generator=generator))
    return lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=asset("nano"))
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--quant", choices=("int8", "int4"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = keye.load(arguments.model, quant=arguments.quant).engine
    trainer = Trainer(keye.load(arguments.model, quant=arguments.quant).runtime.model)
    adapter = None
    if arguments.adapter:
        with TemporaryDirectory() as folder:
            adapter = engine.load_adapter(save_adapter(add_random_lora(trainer.model), Path(folder)), ADAPTER)
    layout, differences = Layout.of_folder(arguments.model), list[Tensor]()
    equal = total = 0
    for full in make_packs(layout, arguments.frames):
        packed = move_batch(load(full), trainer.model.device)
        ours, step = trainer.log_probs(packed)
        some_equal, some = count_equal_rows(trainer, engine.runtime.model, adapter, step.segments)
        equal, total = equal + some_equal, total + some
        differences.append(
            log_prob_differences(
                engine, adapter and adapter.name, full, packed, ours, step, deterministic=arguments.deterministic
            )
        )
        if sum(map(len, differences)) >= arguments.tokens:
            break
    both = torch.cat(differences)
    result = {
        "frames": arguments.frames, "deterministic": arguments.deterministic,
        "adapter": arguments.adapter, "quant": arguments.quant, "rows": total, "rows_equal": equal / total,
        "tokens": len(both), "logprob_mean": round(float(both.mean()), 5),
        "logprob_p99": round(float(both.quantile(0.99)), 5), "logprob_max": round(float(both.max()), 5),
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
