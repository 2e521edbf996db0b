"""Weights between a checkpoint's files and the networks, under the official tensor names.

Fused experts and per-expert tensors are both read; fused ones are written. Loading is strict: every tensor of the model
must be there in its shape as floating-point numbers, and every tensor of the files must have a place, be known to have
none, or be an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from keye.config import KeyeConfig, read_json, vision_config_from_dict
from keye.errors import KeyeError, KeyeWarning, warn
from keye.models.keye import KeyeModel
from keye.models.moe import Experts, Router, lay_out_for_decoding
from keye.models.vision import VisionTower
from keye.weights.names import CARRIED, IGNORED, INDEXER, QUANTISED, VISION, View, file_tensors, per_expert_modules
from keye.weights.safetensors import SHARD_BYTES, open_checkpoint, write_checkpoint
from keye.weights.source import MemoryTensor, TensorSource, WeightsError, ask_for_huge_pages, copy_all

#: (full name, plain layer) -> the layer to use in its place: the same one, or one with the same `forward`, such as a
#: quantised one, a shard, or one that carries an adapter and keeps the plain layer inside its own.
LayerFactory = Callable[[str, nn.Module], nn.Module]


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors that loading left out, sorted.

    `ignored` are parts that no forward pass of any release reads. `unused` have no place in this model: indexer
    weights under a config without `sa_config`, a second copy of tied embeddings, and whatever else the files hold when
    they were not read strictly. `lacks_indexer`: the config describes a sparse-attention indexer but the files hold
    none, so the model was built without it and attends densely.
    """

    ignored: tuple[str, ...]
    unused: tuple[str, ...] = ()
    lacks_indexer: bool = False


def load_model(
    folder: Path, config: KeyeConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    strict: bool = True, layers: LayerFactory | None = None,
) -> tuple[KeyeModel, LoadReport]:  # fmt: skip
    """Builds the model and fills it straight from the files; extra memory is a few buffers, at most a tensor each.

    `dtype` defaults to the one in the config. `layers` replaces layers while they are on the meta device: the files
    must then hold the tensors of the replacements. A 2.0 checkpoint without any indexer weights gives a dense model.
    Raises `WeightsError` that names every missing, mis-shaped and, if `strict`, unexpected tensor.
    """
    dtype = dtype or torch_dtype(config.dtype)
    tensors = open_checkpoint(Path(folder))
    model, plan, report = _plan_model(tensors, config, strict=strict, layers=layers)  # before any memory is taken
    for module in model.modules():
        if isinstance(module, Experts) and dtype == torch.bfloat16 and torch.device(device).type == "cpu":
            lay_out_for_decoding(module)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    _fill(model, plan, tensors)
    model.origin = Path(folder) if any(CARRIED.search(name) for name in report.ignored) else None
    return model.eval(), report


def check_fit(tensors: Mapping[str, TensorSource], config: KeyeConfig) -> LoadReport:
    """What `load_model` would report of these tensors, or the error that it would raise; no tensor is read."""
    return _plan_model(tensors, config, strict=True)[2]


def load_vision(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VisionTower, LoadReport]:
    """The vision tower and projector of any release, also of Keye-VL-671B, whose language model keye does not run.

    Of a sharded checkpoint only the shards that hold them are opened. Errors as in `load_model`.
    """
    raw = read_json(Path(folder) / "config.json")
    dtype = dtype or torch_dtype(str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"))
    hidden = raw.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        raise WeightsError(f"{folder}/config.json has hidden_size {hidden!r}; the projector needs the decoder's width")
    tensors = open_checkpoint(Path(folder), lambda name: name.startswith(VISION))
    with torch.device("meta"):
        tower = VisionTower(vision_config_from_dict(raw), hidden).to(dtype)
    plan, report = _plan(tower, tensors, strict=True)
    tower = tower.to_empty(device=device)
    _fill(tower, plan, tensors)
    return tower.eval(), report


def replace_layers(model: nn.Module, factory: LayerFactory) -> None:
    """Asks `factory` about every `nn.Linear` and `Experts` of a model, on the meta device before a checkpoint is read
    or filled afterwards. Routers, and a head that is tied to the embeddings, stay as they are."""
    tied = getattr(model, "is_tied", False)
    for name, layer in list(model.named_modules()):
        is_matrix = isinstance(layer, nn.Linear | Experts) and not isinstance(layer, Router)
        if is_matrix and not (tied and name == "lm_head"):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, factory(name, layer))


def load_tensors(model: KeyeModel, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Fills an existing model from tensors in memory, under the same rules as `load_model`."""
    sources = {name: MemoryTensor(tensor) for name, tensor in tensors.items()}
    plan, report = _plan(model, sources, strict=strict)
    _fill(model, plan, sources)
    return report


def update_tensors(model: KeyeModel, tensors: Mapping[str, Tensor]) -> int:
    """Replaces weights in place with `tensors` under official names, all or some of the model's; returns the new
    version of the weights. `WeightsError` that names the tensor, before anything is changed, for a name that the model
    does not have, another shape, and numbers that are not floating-point."""
    state, per_expert = model.state_dict(), per_expert_modules(tensors)
    if model.is_tied:
        del state["lm_head.weight"]
    places = {
        name: view(tensor)
        for own, tensor in state.items()
        for name, view in file_tensors(own, tuple(tensor.shape), per_expert)
    }
    unused = {"lm_head.weight"} if model.is_tied else set()
    used = {name: t for name, t in tensors.items() if name not in unused and not IGNORED.search(name)}
    for name, tensor in used.items():
        if name not in places:
            raise WeightsError(f"the model has no tensor {name}; give official names of its weights")
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{name} is a {type(tensor).__name__}; give tensors")
        if tensor.shape != places[name].shape:
            raise WeightsError(f"{name} is {list(tensor.shape)} instead of {list(places[name].shape)}")
        if not tensor.is_floating_point():
            raise WeightsError(f"{name} is {tensor.dtype}; give floating-point numbers")
    with torch.no_grad():
        for name, tensor in used.items():
            places[name].copy_(tensor)
    model.weights_version += 1
    return model.weights_version


def save_model(
    model: KeyeModel, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes the weights under the official names: `model.safetensors`, or shards with an index if there are more than
    `shard_bytes`. Tensors of the official files that no forward pass reads (`CARRIED`) are copied from the folder
    that the model was loaded from. Returns the path of the file or index; see `write_checkpoint`."""
    state = {name: t for name, t in model.state_dict().items() if not (model.is_tied and name == "lm_head.weight")}
    return write_checkpoint({**state, **_carried(model)}, folder, dtype=dtype, shard_bytes=shard_bytes)


def _carried(model: KeyeModel) -> dict[str, Tensor]:
    """Tensors to save that the model itself does not hold; none, with a warning, where their files are gone."""
    if model.origin is None:
        return {}
    try:
        tensors = open_checkpoint(model.origin, lambda name: CARRIED.search(name) is not None)
        return {name: tensor.read() for name, tensor in tensors.items() if tensor.is_readable}
    except KeyeError as error:
        why = f"the packing table of {model.origin} cannot be copied, which vLLM's loader will miss ({error})"
        warn(KeyeWarning(why), stacklevel=3)
        return {}


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `float16` or `float32` as a torch dtype; `WeightsError` for anything else."""
    try:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    except KeyError:
        raise WeightsError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32") from None


# --------------------------------------------------------------------------------------------------------------------
# Matching names

_Plan = dict[str, tuple[str, View]]


def _plan_model(
    tensors: Mapping[str, TensorSource], config: KeyeConfig, *, strict: bool, layers: LayerFactory | None = None
) -> tuple[KeyeModel, _Plan, LoadReport]:
    """A model without memory that suits the tensors, dense if they hold no indexer, and how they fill it."""
    lacks_indexer = config.text.sparse is not None and not any(INDEXER in name for name in tensors)
    with torch.device("meta"):
        model = KeyeModel(config.without_indexer() if lacks_indexer else config)
        if layers is not None:
            replace_layers(model, layers)
    plan, report = _plan(model, tensors, strict=strict)
    return model, plan, replace(report, lacks_indexer=lacks_indexer)


def _plan(model: nn.Module, tensors: Mapping[str, TensorSource], *, strict: bool) -> tuple[_Plan, LoadReport]:
    """File name -> (module tensor, view of it to write), and what is left out; raises for whatever does not fit."""
    state, tied = model.state_dict(), isinstance(model, KeyeModel) and model.is_tied
    per_expert = per_expert_modules(tensors)
    plan: _Plan = {}
    missing: list[str] = []
    wrong: list[str] = []
    unreadable: list[str] = []
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        for wanted, view in file_tensors(name, tuple(tensor.shape), per_expert):
            plan[wanted] = (name, view)
            shape = tuple(view(tensor).shape)
            if wanted not in tensors:
                missing.append(wanted)
            elif tensors[wanted].shape != shape:
                wrong.append(f"{wanted} is {list(tensors[wanted].shape)} instead of {list(shape)}")
            elif not tensors[wanted].is_readable:
                unreadable.append(f"{wanted} is {tensors[wanted].dtype}")
    rest = set(tensors) - set(plan)
    ignored = {name for name in rest if IGNORED.search(name)}
    dense = not any(INDEXER in name for name in state)
    unused = {n for n in rest - ignored if (dense and INDEXER in n) or (tied and n == "lm_head.weight")}
    unexpected = rest - ignored - unused if strict else set()
    problems = (
        ("missing", missing), ("mis-shaped", wrong), ("no floating-point numbers that keye reads", unreadable),
        ("unexpected", unexpected),
    )  # fmt: skip
    if strict and (scales := sorted(name for name in rest if QUANTISED.search(name))):
        raise WeightsError(f"the checkpoint is quantised (it holds {scales[0]}), which keye does not read yet: use the "
                           "bfloat16 release of the model")  # fmt: skip
    if any(names for _, names in problems):
        listed = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems if names)
        raise WeightsError(f"the checkpoint does not fit its config.json; {listed}")
    return plan, LoadReport(tuple(sorted(ignored)), tuple(sorted(rest - ignored)))


def _fill(model: nn.Module, plan: _Plan, tensors: Mapping[str, TensorSource]) -> None:
    """Reads every planned tensor into its place, in the order in which the files hold them."""
    state = model.state_dict()
    for tensor in state.values():
        ask_for_huge_pages(tensor)
    order = sorted(plan, key=lambda name: tensors[name].place)
    copy_all(work for name in order for work in tensors[name].pieces(plan[name][1](state[plan[name][0]])))
