"""What a model is, in a few hashes: whether keys and values that one model computed suit another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from keye.config import ProcessorConfig
from keye.models.keye import KeyeModel
from keye.models.quant_fill import plain_state, quantized_weights
from keye.quant.digest import sampled_bytes


@dataclass(frozen=True)
class Fingerprint:
    """`config`, `processor` and `weights` are SHA-256 in hexadecimal; `dtype` is that of the weights in memory."""

    name: str
    dtype: str
    config: str
    processor: str
    weights: str


def fingerprint(name: str, model: KeyeModel, processor: ProcessorConfig) -> Fingerprint:
    """Of a model as it is in memory, with its default adapter. Reads at most 256 KiB of each tensor."""
    facts = processor.to_dict()
    quantised = {name: weight.digest for name, weight in quantized_weights(model).items()}
    facts["generation"] = facts.pop("release")  # its name in index files, so that earlier ones stay valid
    weights, adapter = weights_hash(plain_state(model), quantised), model.adapter_rows.default
    if adapter is not None:
        weights = _hash_of({"weights": weights, "adapter": adapter.fingerprint})
    return Fingerprint(
        name, str(model.dtype).removeprefix("torch."), _hash_of(model.config.raw), _hash_of(facts), weights
    )  # fmt: skip


def weights_hash(tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """SHA-256 over names, shapes, dtypes and numbers of tensors, large ones in pieces, and hashes of others by name."""
    total = hashlib.sha256()
    for name in sorted({*tensors, *digests}):
        if name in digests:
            total.update(f"{name} {digests[name]}\n".encode())
            continue
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in sampled_bytes(tensor):
            total.update(piece)
    return total.hexdigest()


def _hash_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(data), sort_keys=True, default=str).encode()).hexdigest()
