"""Hashes that distinguish weights, over a part of large tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

#: Tensors up to this size are hashed whole, of larger ones evenly spread pieces that together have this size. Training
#: changes nearly every number of a tensor, so that any step of it shows.
WHOLE_BYTES: Final = 1 << 18
_PIECES: Final = 16


def sampled_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """At most `WHOLE_BYTES` of a tensor on any device."""
    flat = tensor.detach().flatten()
    pieces = [flat]
    if tensor.nbytes > WHOLE_BYTES:
        width = WHOLE_BYTES // _PIECES // tensor.element_size()
        last = flat.shape[0] - width
        pieces = [flat[last * i // (_PIECES - 1) :][:width] for i in range(_PIECES)]
    for piece in pieces:
        yield piece.contiguous().cpu().view(torch.uint8).numpy().data


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 in hexadecimal over dtypes, shapes and sampled bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in sampled_bytes(tensor):
            total.update(piece)
    return total.hexdigest()
