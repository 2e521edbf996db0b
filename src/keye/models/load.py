"""Weights between a checkpoint's files and the networks, under the official tensor names.

Fused experts and per-expert tensors are both read; fused ones are written. Loading is strict: every tensor of the model
must be there in its shape as floating-point numbers, and every tensor of the files must have a place, be known to have
none, or be an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from keye.config import KeyeConfig, read_json, vision_config_from_dict
from keye.errors import KeyeError, KeyeWarning, warn
from keye.models.expert_file import load_on_disk
from keye.models.keye import KeyeModel
from keye.models.moe import Experts, Router, lay_out_for_decoding
from keye.models.quant_fill import (
    Fill,
    check_listed,
    keep_formats,
    plain_fills,
    plain_state,
    quantize_layer,
    quantized_weights,
    stored_policy,
    weight_fills,
)  # fmt: skip
from keye.models.vision import VisionTower
from keye.ops import registry
from keye.ops.quantized import QuantTensor
from keye.quant.layers import QuantExperts, QuantLinear, pack_weights
from keye.quant.policy import Policy, make_policy
from keye.weights.names import CARRIED, IGNORED, INDEXER, VISION, find_quantiser, is_draft, per_expert_modules
from keye.weights.open import open_weights
from keye.weights.safetensors import SHARD_BYTES, write_checkpoint
from keye.weights.source import (
    MemoryTensor,
    TensorSource,
    WeightsError,
    ask_for_huge_pages,
    copy_all,
    dequantized,
)  # fmt: skip

#: (full name, plain layer) -> the layer to use in its place: the same one, or one with the same `forward`, such as a
#: quantised one, a shard, or one that carries an adapter and keeps the plain layer inside its own.
LayerFactory = Callable[[str, nn.Module], nn.Module]
_MATRICES = (nn.Linear, Experts, QuantLinear, QuantExperts)


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors that loading left out, sorted.

    `ignored` are parts that no forward pass of any release reads, and layers for speculative decoding. `unused` have
    no place in this model: indexer weights under a config without `sa_config`, a second copy of tied embeddings, and
    whatever else the files hold when they were not read strictly. `lacks_indexer`: the config describes a
    sparse-attention indexer but the files hold none, so the model was built without it and attends densely.
    """

    ignored: tuple[str, ...]
    unused: tuple[str, ...] = ()
    lacks_indexer: bool = False


def load_model(
    folder: Path, config: KeyeConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    strict: bool = True, layers: LayerFactory | None = None, quant: str | Policy | None = None,
    experts_folder: Path | None = None,
) -> tuple[KeyeModel, LoadReport]:  # fmt: skip
    """Builds the model and fills it straight from the files; extra memory is a few buffers, at most a tensor each.

    `dtype` defaults to the one in the config. Quantised files keep their bits, unless `quant` is none: then those of
    other programs (GGUF) become plain numbers; int4, int8, fp8 or a policy quantises others while they are read.
    `layers` replaces layers while they are on the meta device: the files must then hold the tensors of the
    replacements. A 2.0 checkpoint without any indexer weights gives a dense model. With `experts_folder` quantised
    experts lie in a file there (`keye.models.expert_file`), and not in memory. Raises `WeightsError` that names every
    missing, mis-shaped and, if `strict`, unexpected tensor.
    """
    dtype = dtype or torch_dtype(config.dtype)
    tensors = open_weights(Path(folder))
    if quant == "none":
        tensors, quant = {name: dequantized(source) for name, source in tensors.items()}, None
    policy = make_policy(quant) if isinstance(quant, str) else quant
    if policy is not None:
        check_not_quantised(tensors, config)
    # Before any memory is taken:
    model, plan, report = plan_model(tensors, config, strict=strict, layers=layers, policy=policy)
    lay_out_for_decoding(model, device, dtype)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    if experts_folder is not None:
        plan = load_on_disk(model, plan, tensors, experts_folder)
    fill(model, plan, tensors)
    pack_weights(model)
    model.set_elementwise(registry.find_elementwise(model.device, config.text.hidden_size))
    model.origin = Path(folder) if any(CARRIED.search(name) for name in report.ignored) else None
    return model.eval(), report


def check_fit(tensors: Mapping[str, TensorSource], config: KeyeConfig) -> LoadReport:
    """What `load_model` would report of these tensors, or the error that it would raise; no tensor is read."""
    return plan_model(tensors, config, strict=True)[2]


def loaded_bytes(folder: Path, config: KeyeConfig, dtype: torch.dtype) -> int | None:
    """Bytes that the weights of a folder will take in memory, quantised ones in their formats and others in `dtype`;
    None where there are no weights. Headers are read, no numbers; errors as in `load_model`."""
    try:
        tensors = open_weights(folder)
    except WeightsError:
        return None
    model, _, _ = plan_model(tensors, config, strict=True)
    plain = sum(tensor.numel() * dtype.itemsize for tensor in plain_state(model).values())
    return plain + sum(weight.format.nbytes(weight.shape) for weight in quantized_weights(model).values())


def check_not_quantised(tensors: Mapping[str, TensorSource], config: KeyeConfig) -> None:
    """`WeightsError` for weights that keye has quantised, and for ones of 4 bits. Others may be all that there is:
    float8 with a scale for each block, as in the official files of 671B, or a GGUF file in Q8_0."""
    stored = stored_policy(config)
    kinds = (t.format.kind for t in tensors.values() if t.format is not None)
    kind = stored.kind if stored else next((kind for kind in kinds if kind == "int4"), None)
    if kind is not None:
        raise WeightsError(f"the weights are quantised already ({kind}), and would lose more if they were quantised "
                           "again: take the model that they were made of, or load them as they are")  # fmt: skip


def load_vision(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VisionTower, LoadReport]:
    """The vision tower and projector of any release, also where the language model does not fit.

    Of a sharded checkpoint only the shards that hold them are opened. Errors as in `load_model`.
    """
    raw = read_json(Path(folder) / "config.json")
    dtype = dtype or torch_dtype(str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"))
    hidden = raw.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        raise WeightsError(f"{folder}/config.json has hidden_size {hidden!r}; the projector needs the decoder's width")
    tensors = open_weights(Path(folder), lambda name: name.startswith(VISION))
    with torch.device("meta"):
        tower = VisionTower(vision_config_from_dict(raw), hidden).to(dtype)
    plan, report = _plan(tower, tensors, strict=True)
    tower = tower.to_empty(device=device)
    fill(tower, plan, tensors)
    return tower.eval(), report


def replace_layers(model: nn.Module, factory: LayerFactory) -> None:
    """Asks `factory` about the token embeddings and every `nn.Linear` and `Experts` of a model and what stands in their
    place already, on the meta device before a checkpoint is read or filled afterwards. Routers stay as they are, and a
    head that is tied to the embeddings follows them."""
    tied = getattr(model, "is_tied", False)
    for name, layer in list(model.named_modules()):
        is_matrix = isinstance(layer, _MATRICES) and not isinstance(layer, Router)
        if (is_matrix or name.endswith(".embed_tokens")) and not (tied and name == "lm_head"):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, factory(name, layer))
    if tied and isinstance(model, KeyeModel):
        model.tie_weights()


def load_tensors(model: KeyeModel, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Fills an existing model from tensors in memory, under the same rules as `load_model`."""
    sources = {name: MemoryTensor(tensor) for name, tensor in tensors.items()}
    plan, report = _plan(model, sources, strict=strict)
    fill(model, plan, sources)
    return report


def update_tensors(model: KeyeModel, tensors: Mapping[str, Tensor]) -> int:
    """Replaces weights in place with `tensors` under official names, all or some of the model's, which are quantised
    where the model's are; returns the new version of the weights. `WeightsError` that names the tensor, before anything
    is changed, for a name that the model does not have, another shape, and numbers that are not floating-point."""
    places = {f.name: f for f in _fills(model, (), per_expert_modules(tensors))}
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
        if not bool(tensor.isfinite().all()) and places[name].own in quantized_weights(model):
            raise WeightsError(f"{name} holds NaN or infinite numbers, which cannot be quantised")
    with torch.no_grad():
        fill(model, [places[name] for name in used], {name: MemoryTensor(tensor) for name, tensor in used.items()})
    pack_weights(model)
    model.weights_version += 1
    return model.weights_version


def save_model(
    model: KeyeModel, folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes the weights under the official names: `model.safetensors`, or shards with an index if there are more than
    `shard_bytes`; of a quantised model codes and scales, whatever `dtype` is. Tensors of the official files that no
    forward pass reads (`CARRIED`) are copied from the folder that the model was loaded from. `tensors` are
    the model's where it does not hold them itself. Returns the path of the file or index; see `write_checkpoint`."""
    state = {name: t for name, t in (model.state_dict() if tensors is None else tensors).items()
             if not (model.is_tied and name.startswith("lm_head.weight"))}  # fmt: skip
    if quantized_weights(model) and stored_policy(model.config) is None:
        raise WeightsError("the model keeps the formats of the file that it was loaded from, which a folder cannot "
                           "hold: `keye convert` writes that file's weights as safetensors")  # fmt: skip
    return write_checkpoint({**state, **_carried(model)}, folder, dtype=dtype, shard_bytes=shard_bytes)


def _carried(model: KeyeModel) -> dict[str, Tensor]:
    """Tensors to save that the model itself does not hold; none, with a warning, where their files are gone."""
    if model.origin is None:
        return {}
    try:
        tensors = open_weights(model.origin, lambda name: CARRIED.search(name) is not None)
        read = {name: torch.empty(tensor.shape) for name, tensor in tensors.items() if tensor.is_readable}
        copy_all(work for name, target in read.items() for work in tensors[name].pieces(target))
        return read
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


def plan_model(
    tensors: Mapping[str, TensorSource], config: KeyeConfig, *, strict: bool, layers: LayerFactory | None = None,
    policy: Policy | None = None,
) -> tuple[KeyeModel, list[Fill], LoadReport]:  # fmt: skip
    """A model without memory that suits the tensors, dense if they hold no indexer, and how they fill it. With `policy`
    it is quantised, without one as the tensors are."""
    lacks_indexer = config.text.sparse is not None and not any(INDEXER in name for name in tensors)
    with torch.device("meta"):
        model = KeyeModel(config.without_indexer() if lacks_indexer else config)
        if policy is not None:
            if model.is_tied and policy.parts["head"] != policy.parts["embeddings"]:
                raise WeightsError("the head of this model is its embeddings: give the parts head and embeddings the "
                                   "same format")  # fmt: skip
            section = {"quantization_config": policy.to_dict()}
            model.config = replace(model.config, raw={**model.config.raw, **section})
        stored, per_expert = policy or stored_policy(config), per_expert_modules(tensors)

        def quantise(name: str, layer: nn.Module) -> nn.Module:
            if stored is None:
                return keep_formats(name, layer, tensors, per_expert)
            form = stored.format_of(f"{name}.weight")
            return layer if form is None else quantize_layer(layer, form)

        replace_layers(model, quantise)
        if policy is not None:
            check_listed(model, policy)
        if layers is not None:
            replace_layers(model, layers)
    plan, report = _plan(model, tensors, strict=strict)
    return model, plan, replace(report, lacks_indexer=lacks_indexer)


def fill(model: nn.Module, plan: Collection[Fill], tensors: Mapping[str, TensorSource]) -> None:
    """Reads every planned tensor into its place, in the order in which the files hold them."""
    places: dict[str, Tensor | QuantTensor] = dict(plain_state(model))
    own = {step.own for step in plan}
    for name, weight in quantized_weights(model).items():
        if name in own:
            weight.unpack()
            places[name] = weight.tensor
    for place in places.values():
        ask_for_huge_pages(place.codes if isinstance(place, QuantTensor) else place)
    order = sorted(plan, key=lambda step: tensors[step.name].place)
    copy_all(work for step in order for work in step.work(tensors[step.name], places[step.own]))


def _fills(model: nn.Module, tensors: Collection[str], per_expert: Collection[str]) -> Iterator[Fill]:
    """What fills a model from tensors of these names."""
    tied = isinstance(model, KeyeModel) and model.is_tied
    for name, tensor in plain_state(model).items():
        if not (tied and name == "lm_head.weight"):
            yield from plain_fills(name, tuple(tensor.shape), per_expert)
    for name, weight in quantized_weights(model).items():
        like = QuantTensor.empty(weight.format, weight.shape, "meta")
        yield from weight_fills(name, like, tensors, per_expert)


def _plan(model: nn.Module, tensors: Mapping[str, TensorSource], *, strict: bool) -> tuple[list[Fill], LoadReport]:
    """What fills the model, and what is left out; raises for whatever does not fit."""
    tied = isinstance(model, KeyeModel) and model.is_tied
    plan = list(_fills(model, tensors, per_expert_modules(tensors)))
    missing: list[str] = []
    wrong: list[str] = []
    unreadable: list[str] = []
    for step in plan:
        source = tensors.get(step.name)
        if source is None:
            missing.append(step.name)
        elif (mismatch := step.mismatch(source)) is not None:
            wrong.append(mismatch)
        elif step.dtype is None and not source.is_readable:
            unreadable.append(f"{step.name} is {source.dtype}")
    rest = set(tensors) - {step.name for step in plan}
    text = model.config.text if isinstance(model, KeyeModel) else None
    layers, drafts = (text.num_hidden_layers, text.draft_layers) if text is not None else (0, 0)
    ignored = {name for name in rest if IGNORED.search(name) or is_draft(name, layers, drafts)}
    dense = not any(INDEXER in step.own for step in plan)
    unused = {n for n in rest - ignored if (dense and INDEXER in n) or (tied and n.startswith("lm_head.weight"))}
    unexpected = rest - ignored - unused if strict else set()
    problems = (
        ("missing", missing), ("mis-shaped", wrong), ("no floating-point numbers that keye reads", unreadable),
        ("unexpected", unexpected),
    )  # fmt: skip
    if strict and (quantiser := find_quantiser(rest - ignored)) is not None:
        tool, name = quantiser
        raise WeightsError(f"the checkpoint was quantised by {tool} (it holds {name}), which keye does not read: use "
                           "the bfloat16 release of the model with --quant")  # fmt: skip
    if any(names for _, names in problems):
        listed = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems if names)
        raise WeightsError(f"the checkpoint does not fit its config.json; {listed}")
    return plan, LoadReport(tuple(sorted(ignored)), tuple(sorted(rest - ignored)))
