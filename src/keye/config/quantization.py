"""Which quantisers' files keye reads, by what config.json says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from keye.config.files import ConfigError
from keye.config.float8 import float8_block
from keye.errors import is_whole

#: Where quantisers write into config.json: most, early compressed-tensors, MLX.
QUANTISER_SECTIONS: Final = ("quantization_config", "compression_config", "quantization")
#: Formats of compressed-tensors whose codes keye reads.
_COMPRESSED: Final = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"
)  # fmt: skip
_INSTEAD: Final = "use the bfloat16 release of the model, and `keye quantize` or --quant"


@dataclass(frozen=True)
class CompressedTensors:
    """What may be in a checkpoint of compressed-tensors: `bits` of codes, `groups` of inputs and `blocks` (rows,
    columns) that share a scale. Names and shapes of its tensors say what each layer has."""

    bits: tuple[int, ...]
    groups: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class AffineFormat:
    """MLX: codes of `bits` with a scale and a bias for `group` inputs; `layers` have others of their own."""

    bits: int
    group: int
    layers: Mapping[str, tuple[int, int]]


def check_quantization(raw: Mapping[str, Any]) -> None:
    """`ConfigError` for a config.json of a quantiser that keye does not read."""
    section = raw.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if affine_format(raw) is not None or compressed_tensors(raw) is not None or not section or method == "keye":
        return
    if float8_block(raw) is None:
        named = f" ({method})" if isinstance(method, str) else ""
        raise ConfigError(f"config.json has quantization_config{named}, a quantised checkpoint that keye does not "
                          f"read: {_INSTEAD}")  # fmt: skip


def compressed_tensors(raw: Mapping[str, Any]) -> CompressedTensors | None:
    """What a parsed config.json says of a checkpoint of compressed-tensors, or of float8 with scales of whole rows or
    matrices; None for others. `ConfigError` for formats of it that keye does not read."""
    section = raw.get("quantization_config") or raw.get("compression_config")
    if not isinstance(section, Mapping):
        return None
    if section.get("quant_method") == "fp8" and section.get("weight_block_size") is None:
        float8_block(raw)
        return CompressedTensors((8,))
    if (
        section.get("quant_method", "compressed-tensors" if "config_groups" in section else None)
        != "compressed-tensors"
    ):
        return None
    groups = section.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ConfigError("quantization_config.config_groups must be an object of objects with weights")
    formats = [section.get("format"), *(group.get("format") for group in groups.values())]
    sparse = section.get("sparsity_config") or {}
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        formats.append(sparse["format"])
    for form in formats:
        if form is not None and form not in _COMPRESSED:
            raise ConfigError(f"config.json has the format {str(form)[:60]!r} of compressed-tensors, of which keye "
                              f"reads int4, int8 and float8: {_INSTEAD}")  # fmt: skip
    if section.get("transform_config"):
        raise ConfigError("config.json has a transform_config of compressed-tensors, whose rotations keye does not "
                          f"compute: {_INSTEAD}")  # fmt: skip
    weights = [group["weights"] for group in groups.values() if isinstance(group.get("weights"), Mapping)]
    return CompressedTensors(
        tuple(dict.fromkeys(_bits(weights))) or (4, 8),
        tuple(dict.fromkeys(w["group_size"] for w in weights if is_whole(w.get("group_size")) and w["group_size"] > 0)),
        tuple(dict.fromkeys(_blocks(weights))),
    )


def _bits(weights: list[Mapping[str, Any]]) -> Iterator[int]:
    for weight in weights:
        bits = weight.get("num_bits", 8)
        if not is_whole(bits) or bits not in (4, 8) or (weight.get("type") == "float" and bits != 8):
            kind = weight.get("type", "int")
            raise ConfigError(f"config.json has weights of {bits!r} bits ({kind}) by compressed-tensors, of which keye "
                              f"reads int4, int8 and float8: {_INSTEAD}")  # fmt: skip
        yield bits


def _blocks(weights: list[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    for weight in weights:
        block = weight.get("block_structure")
        if block is None:
            continue
        if not isinstance(block, list) or len(block) != 2 or not all(is_whole(size) and size >= 1 for size in block):
            raise ConfigError(f"config.json has the block_structure {block!r}; it needs two sizes, as in [128, 128]")
        yield block[0], block[1]


def affine_format(raw: Mapping[str, Any]) -> AffineFormat | None:
    """What a parsed config.json says of a checkpoint of MLX; None for others. `ConfigError` for formats of MLX that
    keye does not read."""
    section = raw.get("quantization", raw.get("quantization_config"))
    if not isinstance(section, Mapping) or "quant_method" in section or "bits" not in section:
        return None
    layers = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            layers[name] = _bits_and_group(value, name)
    bits, group = _bits_and_group(section, "the model")
    return AffineFormat(bits, group, layers)


def _bits_and_group(value: Mapping[str, Any], name: str) -> tuple[int, int]:
    bits, group, mode = value.get("bits"), value.get("group_size", 64), value.get("mode", "affine")
    is_known = is_whole(bits) and bits in (4, 8) and is_whole(group) and group in (32, 64, 128)
    if mode != "affine" or not is_known:
        raise ConfigError(f"config.json has quantization of MLX with bits {bits!r}, group_size {group!r} and mode "
                          f"{mode!r} for {name[:200]}; keye reads affine 4 and 8 bits in groups of 32, 64 or 128: "
                          f"{_INSTEAD}")  # fmt: skip
    assert isinstance(bits, int) and isinstance(group, int)
    return bits, group
