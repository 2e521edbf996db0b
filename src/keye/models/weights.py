"""Weights between safetensors files and a `KeyeModel`, under the official tensor names.

Fused experts (`mlp.experts.gate_up_proj`) and per-expert tensors (`mlp.experts.3.up_proj.weight`) are both read; fused
ones are written. Nothing here runs code from a checkpoint: only safetensors are opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye.config import KeyeConfig, read_json
from keye.errors import KeyeError
from keye.files import complete_file
from keye.models.keye import KeyeModel

#: In official files but never read by the language model: the SigLIP pooling head, the packing table, rotary buffers.
IGNORED = re.compile(
    r"visual\.vision_model\.head\.|\.packing_position_embedding\.|\.rotary_emb\.inv_freq$|\.position_ids$"
)
_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"


class WeightsError(KeyeError):
    """A checkpoint's tensors do not fit the model that its config describes."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors that loading left out."""

    ignored: tuple[str, ...]


def load_model(
    folder: Path, config: KeyeConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[KeyeModel, LoadReport]:
    """Builds the model and fills it tensor by tensor, so that peak extra memory is one tensor.

    `dtype` defaults to the one in the config. Raises `WeightsError` that names every missing, unexpected or mis-shaped
    tensor.
    """
    dtype = dtype or torch_dtype(config.dtype)
    tensors = open_checkpoint(Path(folder))
    with torch.device("meta"):
        model = KeyeModel(config).to(dtype)
    plan, ignored = _plan(model, tensors)  # before any memory is taken
    model = model.to_empty(device=device)
    model.tie_weights()
    _fill(model, plan, tensors)
    return model.eval(), LoadReport(ignored)


def load_tensors(model: KeyeModel, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Fills an existing model from tensors in memory, under the same rules as `load_model`."""
    lazy = {name: LazyTensor(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]
    plan, ignored = _plan(model, lazy)
    _fill(model, plan, lazy)
    return LoadReport(ignored)


def save_model(model: KeyeModel, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes `model.safetensors` under the official names, through a temporary file. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = model.config.text.tie_word_embeddings
    state = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    path = folder / WEIGHTS_FILE
    with complete_file(path) as draft:
        save_file(state, draft, metadata={"format": "pt"})
    return path


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `float16` or `float32` as a torch dtype; `WeightsError` for anything else."""
    try:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    except KeyError:
        raise WeightsError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32") from None


def open_checkpoint(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder: the shards of its index, else `model.safetensors`, else every `*.safetensors` in it.
    Reads headers only."""
    index = folder / INDEX_FILE
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} names a shard outside its folder; refusing to follow it")
        files = [folder / name for name in names]
    elif (folder / WEIGHTS_FILE).exists():
        files = [folder / WEIGHTS_FILE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no .safetensors weights")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read as safetensors: {error}") from None
        for name in handle.keys():  # noqa: SIM118 - not a dict
            shape = tuple(handle.get_slice(name).get_shape())
            tensors[name] = LazyTensor(shape, lambda h=handle, n=name: h.get_tensor(n))  # type: ignore[misc]
    return tensors


# --------------------------------------------------------------------------------------------------------------------
# Matching names

_Place = Callable[[Tensor], Tensor]
_Plan = dict[str, tuple[str, _Place]]


def _plan(model: KeyeModel, tensors: Mapping[str, LazyTensor]) -> tuple[_Plan, tuple[str, ...]]:
    """File name -> (module tensor, view of it to write), and the ignored names; raises for whatever does not fit."""
    per_expert = {match[1] for name in tensors if (match := _EXPERT.match(name))}
    plan: _Plan = {}
    wrong: list[str] = []
    missing: list[str] = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.text.tie_word_embeddings:
            continue
        for wanted, place in _sources(name, tensor, per_expert):
            plan[wanted] = (name, place)
            shape = tuple(place(tensor).shape)
            if wanted not in tensors:
                missing.append(wanted)
            elif tensors[wanted].shape != shape:
                wrong.append(f"{wanted} is {list(tensors[wanted].shape)} instead of {list(shape)}")
    rest = set(tensors) - set(plan)
    ignored = {name for name in rest if IGNORED.search(name) or _is_unused(name, model)}
    problems = (("missing", missing), ("mis-shaped", wrong), ("unexpected", rest - ignored))
    if any(names for _, names in problems):
        listed = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems if names)
        raise WeightsError(f"the checkpoint does not fit its config.json; {listed}")
    return plan, tuple(sorted(ignored))


def _sources(name: str, tensor: Tensor, per_expert: set[str]) -> Iterator[tuple[str, _Place]]:
    """The file tensors that make up module tensor `name`: itself, or one piece for each expert."""
    prefix, _, leaf = name.rpartition(".")
    if prefix not in per_expert:
        yield name, lambda t: t
        return
    inner = tensor.shape[2] // 2
    for e in range(tensor.shape[0]):
        if leaf == "down_proj":
            yield f"{prefix}.{e}.down_proj.weight", lambda t, e=e: t[e].t()  # type: ignore[misc]
        else:
            yield f"{prefix}.{e}.gate_proj.weight", lambda t, e=e: t[e, :, :inner].t()  # type: ignore[misc]
            yield f"{prefix}.{e}.up_proj.weight", lambda t, e=e: t[e, :, inner:].t()  # type: ignore[misc]


def _is_unused(name: str, model: KeyeModel) -> bool:
    """Indexer weights of a model that its config runs dense, and the second copy of tied embeddings."""
    text = model.config.text
    return (text.sparse is None and ".sa_indexer." in name) or (text.tie_word_embeddings and name == "lm_head.weight")


def _fill(model: KeyeModel, plan: _Plan, tensors: Mapping[str, LazyTensor]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for wanted, (name, place) in plan.items():
            place(state[name]).copy_(tensors[wanted].read())
