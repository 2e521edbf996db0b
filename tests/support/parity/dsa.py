"""Set `dsa`: the sparse-attention indexer, its selections and everything downstream, in three numerics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.models.attention import CachedStep, IndexerOutput, Numerics, Span
from keye.models.keye import KeyeModel
from keye.ops import reference
from keye.ops.registry import backends
from tests.support.parity.cases import FLOAT_TOLERANCE, LOGIT_TOLERANCE, Case, Check, NotApplicable
from tests.support.parity.networks import build_model

NUMERICS: dict[str, Numerics] = {"fp32": "exact", "fp32q": "fp8", "bf16q": "official"}
#: By mode: tolerance of indexer tensors, and the score gap below which a selection may differ.
INDEX_TOLERANCE = {"fp32": FLOAT_TOLERANCE, "fp32q": FLOAT_TOLERANCE, "bf16q": 2e-2}
MARGIN = {"fp32": 1e-3, "fp32q": 1e-3, "bf16q": 3e-2}
#: A value that lies on the boundary between two float8 numbers goes either way with the last bit of a sum. Whole-model
#: scores get this tolerance where they are quantised; from the recorded queries and keys they must agree strictly.
QUANTISED_SCORE_TOLERANCE = 2e-2
#: The share of quantised key elements that may be such neighbours.
BOUNDARY_SHARE = 0.005


def run_dsa(case: Case, check: Check) -> None:
    mode = case.meta["mode"]
    if mode not in NUMERICS:
        raise NotApplicable(f"dsa mode {mode!r} is unknown to this version")
    model = build_model(case)
    model.set_indexer_numerics(NUMERICS[mode])
    layers = model.config.text.num_hidden_layers
    caches = [KVCache(layers) for _ in case.meta["steps"][0]["extend_lens"]]
    recorded = _RecordedIndex(case, NUMERICS[mode])
    with torch.no_grad():
        for step in case.meta["steps"]:
            number = step["step"]
            got = _run_step(model, case, number, step["extend_lens"], caches)
            for layer in range(layers):
                recorded.check(check, number, layer, step["extend_lens"])
            for name, want in case.tensors.items():
                prefix, _, rest = name.partition(".")
                if prefix == f"s{number}" and rest in got:
                    _compare(check, case, f"{prefix}.{rest}", got[rest], want, mode)
            missing = sorted(_recorded(case, number) - set(got))
            if missing:
                check.fail(f"s{number}", f"nothing was compared with {', '.join(missing)}")


def _recorded(case: Case, number: int) -> set[str]:
    """Names of the step's recorded results."""
    names = {name.partition(".")[2] for name in case.tensors if name.startswith(f"s{number}.")}
    return {name for name in names if name not in ("input_ids", "positions") and not name.endswith(".margin")}


def _compare(check: Check, case: Case, name: str, got: Tensor, want: Tensor, mode: str) -> None:
    leaf = name.rpartition(".")[2]
    if leaf == "topk_sorted":
        margin = case.tensors.get(name.replace("topk_sorted", "margin"))
        for row, (mine, theirs) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
            if margin is None or float(margin[row]) > MARGIN[mode]:
                check.equal(f"{name}[{row}]", sorted(set(mine) - {-1}), sorted(set(theirs) - {-1}))
    elif leaf == "scores" and mode != "fp32":
        check.close(name, got, want, QUANTISED_SCORE_TOLERANCE)
    elif leaf == "index_k_q" and mode != "fp32":
        far = (got - want).abs() > FLOAT_TOLERANCE
        neighbour = (got - want).abs() <= torch.maximum(got.abs(), want.abs()) / 8
        check.equal(f"{name}: elements beyond a neighbouring float8", int((far & ~neighbour).sum()), 0)
        check.equal(f"{name}: more than {BOUNDARY_SHARE:.1%} differ", bool(far.float().mean() > BOUNDARY_SHARE), False)
    elif leaf in ("idx_q", "idx_k", "scores"):
        check.close(name, got, want, INDEX_TOLERANCE[mode])
    else:
        check.close(name, got, want, LOGIT_TOLERANCE if leaf == "logits" else FLOAT_TOLERANCE)


class _RecordedIndex:
    """Quantisation and scores from the recorded queries and keys: the same arithmetic without the network's noise."""

    def __init__(self, case: Case, numerics: Numerics) -> None:
        self._tensors, self._quantised = case.tensors, numerics != "exact"
        self._keys: dict[tuple[int, int], Tensor] = {}  # (layer, sequence) -> keys so far

    def check(self, check: Check, number: int, layer: int, lengths: list[int]) -> None:
        prefix = f"s{number}.L{layer}"
        keys = self._round(self._tensors[f"{prefix}.idx_k"])
        for sequence, part in enumerate(keys.split(lengths)):
            past = self._keys.get((layer, sequence), part[:0])
            self._keys[layer, sequence] = torch.cat((past, part))
        cached = self._tensors[f"{prefix}.index_k_q"] * self._tensors[f"{prefix}.index_k_scale"]
        check.close(f"{prefix}.index_k_q from recorded idx_k", keys, cached, FLOAT_TOLERANCE)
        if f"{prefix}.scores" in self._tensors:
            got = self._scores(prefix, layer, lengths)
            check.close(f"{prefix}.scores from recorded q, k", got, self._tensors[f"{prefix}.scores"], FLOAT_TOLERANCE)

    def _scores(self, prefix: str, layer: int, lengths: list[int]) -> Tensor:
        queries = self._round(self._tensors[f"{prefix}.idx_q"])
        gates = self._tensors[f"{prefix}.idx_w_raw"] * queries.shape[-1] ** -0.5
        sequences = enumerate(zip(queries.split(lengths), gates.split(lengths), strict=True))
        return _padded([_causal_scores(q, self._keys[layer, s], gate) for s, (q, gate) in sequences])

    def _round(self, x: Tensor) -> Tensor:
        if not self._quantised:
            return x
        values, scale = reference.quantize_fp8(x)
        return values * scale


def _causal_scores(q: Tensor, keys: Tensor, gate: Tensor) -> Tensor:
    """Scores of the last queries of a sequence against all its keys, -inf where a query may not look."""
    length = len(keys)
    last = torch.arange(length - len(q), length).unsqueeze(1)
    return reference.indexer_scores(q, keys, gate).masked_fill(torch.arange(length) > last, -torch.inf)


def _padded(scores: list[Tensor]) -> Tensor:
    """Rows of all sequences, as wide as the longest, filled with -inf."""
    width = max(part.shape[1] for part in scores)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in scores])


def _run_step(
    model: KeyeModel, case: Case, number: int, lengths: list[int], caches: list[KVCache]
) -> dict[str, Tensor]:
    """One ragged forward pass; returns its results under the names of the vectors, without the step prefix."""
    spans, start = [], 0
    for cache, length in zip(caches, lengths, strict=True):
        spans.append(Span(start, start + length, cache))
        start += length
    ids = case.tensors[f"s{number}.input_ids"]
    positions = case.tensors[f"s{number}.positions"].view(-1, len(ids)).expand(3, -1)
    got: dict[str, Tensor] = {}
    step = _ObservedStep(spans, model, got)
    with _projections(model, got):
        got["logits"] = model.logits(model(model.embed(ids), positions, step))
    return got


class _ObservedStep(CachedStep):
    """A `CachedStep` that also writes down selections, scores, attention outputs and layer outputs."""

    def __init__(self, spans: list[Span], model: KeyeModel, got: dict[str, Tensor]) -> None:
        super().__init__(spans, model.config.text, on_layer=lambda i, x: got.__setitem__(f"L{i}.layer_out", x))
        self._got = got

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        assert index is not None
        calls = _Calls(self.topk)
        with calls:
            out = super().attend(layer, q, k, v, index)
        self._got[f"L{layer}.sparse_attn"] = out.flatten(1)
        self._got[f"L{layer}.topk_sorted"] = calls.by_span()
        self._got[f"L{layer}.scores"] = self._scores(layer, index)
        return out

    def _scores(self, layer: int, index: IndexerOutput) -> Tensor:
        parts = [
            _causal_scores(
                index.q[span.start : span.stop],
                span.cache.read_range(layer, "indexer_k", 0, span.cache.length(layer)).squeeze(1),
                index.gate[span.start : span.stop],
            )
            for span in self.spans
        ]
        return _padded(parts)


@dataclass
class _Calls:
    """Positions [T, K] that the reference attention used while it is entered, for the queries of each of its calls."""

    topk: int

    def by_span(self) -> Tensor:
        """The positions in the order of the queries: dense and sparse spans of a step are attended apart."""
        return torch.cat([positions for _, positions in sorted(self.calls, key=lambda call: call[0])])

    def __enter__(self) -> _Calls:
        self.calls: list[tuple[int, Tensor]] = []  # where the queries lie in memory, and their positions
        self._patch = pytest.MonkeyPatch()
        sparse, dense = reference.sparse_attention, reference.dense_attention

        def watch_sparse(q: Tensor, selection: Iterable[tuple[int, Tensor]], rows: Any) -> Tensor:
            blocks = list(selection)
            self.calls.append((q.data_ptr(), torch.cat([positions for _, positions in blocks])))
            return sparse(q, blocks, rows)

        def watch_dense(q: Tensor, rows: Any, first: int) -> Tensor:
            last = first + torch.arange(q.shape[0]).unsqueeze(1)
            positions = torch.arange(self.topk).expand(q.shape[0], -1)
            assert int(last.max()) < self.topk, "dense attention beyond topk keys"
            self.calls.append((q.data_ptr(), positions.masked_fill(positions > last, -1)))
            return dense(q, rows, first)

        # The compiled kernels choose and attend in one call, where nothing can be watched.
        self._kernels = backends.using("reference")
        self._kernels.__enter__()
        self._patch.setattr(reference, "sparse_attention", watch_sparse)
        self._patch.setattr(reference, "dense_attention", watch_dense)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._kernels.__exit__(None, None, None)


@contextmanager
def _projections(model: KeyeModel, got: dict[str, Tensor]) -> Iterator[None]:
    """Writes down what each layer's indexer and attention make of their inputs."""
    handles = []
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        handles.append(attention.register_forward_hook(lambda _m, _i, out, i=i: got.__setitem__(f"L{i}.attn_out", out)))
        handles.append(
            attention.sa_indexer.register_forward_hook(
                lambda module, inputs, out, i=i: got.update(
                    {f"L{i}.{name}": value for name, value in _indexer_tensors(module, inputs, out).items()}
                )
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _indexer_tensors(indexer: Any, inputs: tuple[Tensor, Tensor, Tensor], out: IndexerOutput) -> dict[str, Tensor]:
    """The recorded names of one indexer call. Scales are one where nothing is quantised."""
    q, k, w = indexer.project(*inputs)
    if indexer.numerics == "exact":
        q_scale, k_values, k_scale = torch.ones_like(q[..., :1]), k, torch.ones_like(k[..., :1])
    else:
        _, q_scale = reference.quantize_fp8(q)
        k_values, k_scale = reference.quantize_fp8(k)
    return {
        "attn_in": inputs[0], "idx_q": q.float(), "idx_k": k.float(), "idx_w_raw": w,
        "idx_weights": out.gate * q_scale.squeeze(-1), "idx_q_scale": q_scale,
        "index_k_q": k_values, "index_k_scale": k_scale,
    }  # fmt: skip
