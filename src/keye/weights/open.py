"""Opening a source of weights, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from keye.config import read_json
from keye.config.float8 import float8_block
from keye.weights.float8 import FLOAT8, join_scales
from keye.weights.safetensors import open_checkpoint
from keye.weights.source import TensorSource


def open_weights(path: Path, wanted: Callable[[str], bool] | None = None) -> Mapping[str, TensorSource]:
    """The tensors of a checkpoint under official names; headers are read, no numbers.

    `wanted` leaves out names, and files that hold no other ones are not opened. `WeightsError` where nothing at `path`
    is a checkpoint.
    """
    from keye.weights.gguf.folder import find_mmproj, read_link
    from keye.weights.gguf.reader import is_gguf

    if path.is_file() and is_gguf(path):
        link: tuple[Path, Path | None] | None = path, find_mmproj(path)
    else:
        link = read_link(path)
    if link is not None:
        from keye.weights.gguf.source import open_gguf

        return open_gguf(*link, wanted)
    tensors, config = open_checkpoint(path, wanted), path / "config.json"
    if not config.exists() or not any(tensor.dtype == FLOAT8 for tensor in tensors.values()):
        return tensors
    block = float8_block(read_json(config))
    return tensors if block is None else join_scales(tensors, block)
