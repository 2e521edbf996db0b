"""Opening a source of weights, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from keye.config import read_json
from keye.config.float8 import float8_block
from keye.config.quantization import affine_format, compressed_tensors
from keye.weights.compressed_tensors import join_compressed
from keye.weights.float8 import join_scales
from keye.weights.mlx import join_affine
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

        return open_gguf(*link, wanted, compact=True)
    config = path / "config.json"
    raw = read_json(config) if config.exists() else {}
    if (affine := affine_format(raw)) is not None:
        joined: Mapping[str, TensorSource] = join_affine(open_checkpoint(path), affine)
        return {name: source for name, source in joined.items() if wanted is None or wanted(name)}
    tensors = open_checkpoint(path, wanted)
    if (compressed := compressed_tensors(raw)) is not None:
        return join_compressed(tensors, compressed)
    block = float8_block(raw)
    return tensors if block is None else join_scales(tensors, block)
