"""What the number formats of stored keys and values cost and lose.

    python benchmarks/kv_formats.py --json                      # bytes a token, errors of attention: seconds
    python benchmarks/kv_formats.py --json --questions 2000     # and keye-nano's scores: minutes for each format
    python benchmarks/kv_formats.py --json --questions 2000 --formats auto indexer-int8

Bytes are of all layers of one token, for keys and values alone and with indexer keys (in the model's own format).
`attention_error` is the norm of the difference of attention outputs, over the norm of the outputs, when keye-nano's own
activations on a FrameForge clip (float32) are read back from a store of that format instead of float32; the mean over
layers and queries. Selection is the indexer's in both. `indexer_overlap` is the share of the keys that the indexer
selects by exact scores which it also selects when its keys, and the queries that meet them, are rounded to that format:
the mean over layers and over queries with more than k keys. `indexer-int8` asks with indexer keys of that format alone,
keys and values as in `auto`. Scores are of `keye eval frameforge` with its defaults, the same
questions for every format, one process each, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVLayout, KVStore
from keye.chat.messages import Medium, Message
from keye.config import TextConfig, load_model_config
from keye.hub import asset
from keye.models.attention import CachedStep, IndexerOutput, Span, cache_rows
from keye.ops.kv_blocks import RowFormat, RowKind
from keye.ops.reference import round_queries, select_topk

FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)
INDEXER_INT8 = "indexer-int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--questions", type=int, default=0, help="also ask keye-nano so many questions in each format")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, INDEXER_INT8], default=["auto", "int8", "int4"],
                        help="formats that are asked (default: auto int8 int4)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="formats that are asked at the same time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    geometries = {"2.0": asset("configs/2.0"), "nano": asset("nano")}
    result: dict[str, Any] = {
        "bytes_per_token": {
            name: bytes_of(load_model_config(folder).text, torch.bfloat16) for name, folder in geometries.items()
        },
        **activations(),
    }
    if options.questions:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            scores = pool.map(score, options.formats, [options.questions] * len(options.formats))
            result["scores"] = dict(zip(options.formats, scores, strict=True))
    print(json.dumps(result, indent=2))


def bytes_of(config: TextConfig, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Bytes of a token in each format, and how many times more bfloat16 keys and values take."""
    layouts = {kv: KVLayout.of(cache_rows(config), dtype, kv) for kv in FORMATS}
    index = {kv: layout.scanned_block_bytes // 64 for kv, layout in layouts.items()}
    alone = {kv: layout.token_bytes - index[kv] for kv, layout in layouts.items()}
    return {
        kv: {
            "keys_values": alone[kv],
            "with_indexer_keys": layout.token_bytes,
            "fewer_than_bf16": round(alone["bf16"] / alone[kv], 3),
            "fewer_than_bf16_with_indexer_keys": round(layouts["bf16"].token_bytes / layout.token_bytes, 3),
        }
        for kv, layout in layouts.items()
    }


class _Compared(CachedStep):
    """Attends to a float32 store, and beside it to stores of other formats that get the same keys and values."""

    def __init__(self, span: Span, config: TextConfig, others: dict[KVFormat, KVCache]) -> None:
        super().__init__([span], config)
        self.others = others
        self.errors: dict[KVFormat, list[float]] = {kv: [] for kv in others}
        self.overlaps: dict[RowKind, list[float]] = {"bfloat16": [], "fp8": [], "int8": []}
        self._config = config

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: IndexerOutput | None
    ) -> torch.Tensor:
        exact = super().attend(layer, q, k, v, index)
        for kv, cache in self.others.items():
            step = CachedStep([Span(0, q.shape[0], cache)], self._config)
            got = step.attend(layer, q, k, v, index)
            error = (got - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            self.errors[kv].append(float(error.mean()))
        assert index is not None
        for kind, shares in self.overlaps.items():
            shares.append(overlap(index, kind, self.topk))
        return exact


def overlap(index: IndexerOutput, kind: RowKind, topk: int) -> float:
    """Share of the keys that queries with more than `topk` of them select by exact scores and also by rounded ones."""
    form = RowFormat(kind, 1, index.k.shape[-1])
    keys = form.decode(form.encode(index.k.unsqueeze(1)), torch.float32)[:, 0]
    queries = round_queries(index.q) if kind == "int8" else index.q
    sets = [
        torch.cat([positions for _, positions in select_topk(q, index.gate, tiles, 0, topk)])[topk:]
        for q, tiles in ((index.q, lambda start, stop: index.k[start:stop]),
                         (queries, lambda start, stop: keys[start:stop]))
    ]  # fmt: skip
    return float((sets[0].unsqueeze(2) == sets[1].unsqueeze(1)).any(2).float().mean())


def activations() -> dict[str, dict[str, float]]:
    """Relative errors of attention outputs, and overlaps of sets, on keye-nano's activations, by format."""
    from keye.data.frameforge import make_clip, questions, render
    from keye.engine.prompt import PromptBuilder

    model = keye.load("nano", dtype="float32")
    clip = make_clip(11, frames=32, objects=4, split="test", size=(112, 112))
    question = questions(clip, random.Random(0), 1)[0].text
    builder = PromptBuilder(model.config, model.tokenizer, model.processor)
    frames = keye.Frames(render(clip), clip.timestamps)
    prompt = builder.build([Message("user", (Medium("video", frames), question))])
    text = model.config.text
    layouts = {kv: KVLayout.of(cache_rows(text), torch.float32, kv) for kv in FORMATS if kv != "auto"}
    others = {kv: KVCache(text.num_hidden_layers, KVStore(layout)) for kv, layout in layouts.items()}
    vision = prompt.vision()
    assert vision is not None
    with torch.inference_mode():
        x = model.model.embed(prompt.token_ids, model.model.encode_vision(*vision))
        step = _Compared(Span(0, x.shape[0], KVCache(text.num_hidden_layers)), text, others)
        model.model(x, prompt.position_ids, step)
    means = {"attention_error": step.errors, "indexer_overlap": step.overlaps}
    return {
        name: {kv: round(sum(values) / len(values), 5) for kv, values in by_format.items()}
        for name, by_format in means.items()
    }


def score(kv: str, count: int) -> dict[str, Any]:
    """keye-nano's scores in one format."""
    from keye.evals.tasks.frameforge import EvalOptions, evaluate

    torch.set_num_threads(1)
    formats: dict[str, Any] = {"indexer_kv": "int8"} if kv == INDEXER_INT8 else {"kv": kv}
    result = evaluate(keye.load("nano").runtime, EvalOptions(questions=count, **formats))
    print(f"{kv}: accuracy {result['accuracy']}, mIoU {result['miou']}", file=sys.stderr, flush=True)
    remaining = ("questions", "accuracy", "accuracy_error", "miou", "miou_error", "seconds")
    return {name: result[name] for name in remaining}


if __name__ == "__main__":
    main()
