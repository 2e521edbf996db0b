"""Experts on disk: their packed weights in a file that is mapped into memory, so that the system keeps those that are
used and reads the others when they are chosen. The kernels and the bytes are those of experts in memory.

The file is made when a model is first loaded so, one weight after another, and found again by what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from keye.files import complete_file
from keye.models.quant_fill import Fill
from keye.ops import registry
from keye.ops.mapped import advise, map_tensor
from keye.quant.layers import QuantExperts, QuantizedWeight
from keye.units import format_bytes
from keye.version import __version__
from keye.weights.source import TensorSource, WeightsError, copy_all

#: Bytes of disk that stay free.
RESERVE: Final = 1 << 30
_DTYPES: Final = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def expert_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The weights of quantised experts by their names."""
    weights = dict[str, QuantizedWeight]()
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            weights |= {f"{name}.gate_up_proj": module.gate_up_proj, f"{name}.down_proj": module.down_proj}
    return weights


def load_on_disk(
    model: nn.Module, plan: Collection[Fill], tensors: Mapping[str, TensorSource], folder: Path
) -> list[Fill]:
    """Fills the experts of a model, which lie in a file in `folder` afterwards, and returns what is left to fill.
    Besides that file one weight at a time is in memory. `WeightsError` for experts that no kernel reads packed, and
    where the disk has no room."""
    weights = expert_weights(model)
    forms = {weight.format for weight in weights.values()}
    if not forms or any(registry.empty_packed(form, (1, 64, 64), torch.bfloat16) is None for form in forms):
        raise WeightsError("experts on disk need experts in int4 or int8 and the compiled core: load a model that has "
                           "experts with quant int4 or int8, on the processor")  # fmt: skip
    key = _key(weights, plan, tensors)
    data, facts = folder / f"experts-{key}.bin", folder / f"experts-{key}.json"
    if not facts.is_file() or not data.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"{folder} cannot hold experts ({error.strerror}): name another folder") from None
        _write(data, facts, weights, plan, tensors)
    else:
        try:
            _read(data, json.loads(facts.read_text(encoding="utf-8")), weights)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            raise WeightsError(f"{data} or {facts.name} beside it is damaged: remove both, and load the model again"
                               ) from None  # fmt: skip
    return [step for step in plan if step.own not in weights]


def _key(weights: Mapping[str, QuantizedWeight], plan: Collection[Fill], tensors: Mapping[str, TensorSource]) -> str:
    """What the file depends on: the tensors it is made from, the files they lie in, formats, version and processor."""
    total = hashlib.sha256(f"{__version__} {registry.describe_packing()}".encode())
    for step in sorted((step for step in plan if step.own in weights), key=lambda step: step.name):
        source = tensors[step.name]
        total.update(f"{step.name} {source.shape} {source.dtype} {source.place} {weights[step.own].format}\n".encode())
    for file in sorted({tensors[step.name].place[0] for step in plan if os.path.isfile(tensors[step.name].place[0])}):
        status = os.stat(file)
        total.update(f"{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:32]


def _write(
    data: Path, facts: Path, weights: Mapping[str, QuantizedWeight], plan: Collection[Fill],
    tensors: Mapping[str, TensorSource],
) -> None:  # fmt: skip
    """Fills and packs one weight after another and moves it into the file."""
    total = sum(_round(weight.tensor.nbytes * 9 // 8) for weight in weights.values())
    free = shutil.disk_usage(data.parent).free
    if free < total + RESERVE:
        raise WeightsError(f"experts on disk take {format_bytes(total)} of {data.parent}, where {format_bytes(free)} "
                           "are free: free some, or name another folder")  # fmt: skip
    places, offset = dict[str, Any](), 0
    try:
        with complete_file(data) as draft, draft.open("w+b") as file:
            for name, weight in weights.items():
                tensor = weight.tensor
                steps = sorted((step for step in plan if step.own == name), key=lambda step: tensors[step.name].place)
                copy_all(work for step in steps for work in step.work(tensors[step.name], tensor))
                weight.pack()
                packed = weight.packed
                assert packed is not None
                file.seek(offset)
                file.write(packed.data.contiguous().numpy().data)
                places[name] = {"offset": offset, "nbytes": packed.nbytes, "scale_dtype": str(packed.scale_dtype),
                                "digest": weight.digest}  # fmt: skip
                offset = _round(offset + packed.nbytes)
                packed.move(torch.empty(packed.nbytes, dtype=torch.uint8), is_mapped=False)  # frees what it has
        with complete_file(facts) as draft:
            draft.write_text(json.dumps(places), encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{data} cannot be written ({error.strerror}): free space, or name another folder") from None
    _read(data, places, weights)


def _read(data: Path, places: Mapping[str, Any], weights: Mapping[str, QuantizedWeight]) -> None:
    """Has the weights lie in the file."""
    with data.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    advise(mapped, "MADV_RANDOM", 0, len(mapped))
    for name, weight in weights.items():
        place = places.get(name, {"offset": 0, "nbytes": 0, "scale_dtype": "torch.bfloat16"})
        packed = registry.empty_packed(weight.format, weight.shape, _DTYPES[place["scale_dtype"]])
        if packed is None or packed.nbytes != place["nbytes"] or place["offset"] + place["nbytes"] > len(mapped):
            raise WeightsError(f"{data} is damaged: remove it, and load the model again")
        packed.move(map_tensor(mapped, place["offset"], (packed.nbytes,)), is_mapped=True)
        weight.adopt(packed, str(place["digest"]))


def _round(nbytes: int) -> int:
    """Up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
