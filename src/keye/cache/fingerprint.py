"""What a model is, in a few hashes: whether keys and values that one model computed suit another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from keye.config import ProcessorConfig
from keye.models.keye import KeyeModel

#: Tensors up to this size are hashed whole, of larger ones evenly spread pieces that together have this size. Training
#: changes nearly every number of a tensor, so that any step of it shows.
WHOLE_BYTES: Final = 1 << 18
_PIECES: Final = 16


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
    facts["generation"] = facts.pop("release")  # its name in index files, so that earlier ones stay valid
    weights, adapter = weights_hash(model.state_dict()), model.adapter_rows.default
    if adapter is not None:
        weights = _hash_of({"weights": weights, "adapter": adapter.fingerprint})
    return Fingerprint(
        name, str(model.dtype).removeprefix("torch."), _hash_of(model.config.raw), _hash_of(facts), weights
    )  # fmt: skip


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and numbers of tensors, large ones in pieces."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.flatten()
        pieces = [flat]
        if tensor.nbytes > WHOLE_BYTES:
            width = WHOLE_BYTES // _PIECES // tensor.element_size()
            last = flat.shape[0] - width
            pieces = [flat[last * i // (_PIECES - 1) :][:width] for i in range(_PIECES)]
        for piece in pieces:
            digest.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(data), sort_keys=True, default=str).encode()).hexdigest()
