"""Names of tensors in checkpoints: which files hold a module's tensor, and which names have no place in a model.

Fused experts (`mlp.experts.gate_up_proj`) and per-expert tensors (`mlp.experts.3.up_proj.weight`) are both known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import Tensor

#: In official files but never read by a forward pass: the SigLIP pooling head, the packing table, rotary buffers.
IGNORED = re.compile(
    r"visual\.vision_model\.head\.|\.packing_position_embedding\.|\.rotary_emb\.inv_freq$|\.position_ids$"
)
#: Those of them that are parameters of the official modules: other loaders (vLLM's) miss them in a checkpoint, so that
#: saving copies them from the files that the model was loaded from.
CARRIED = re.compile(r"visual\.vision_model\.head\.|\.packing_position_embedding\.")
#: The bias of DeepSeek-V3's router, in float32 whatever the other tensors are: it decides between nearly equal scores.
ROUTER_BIAS = re.compile(r"\.e_score_correction_bias$")
#: Names of an indexer's tensors have this in them, those of the vision tower and projector begin with these.
INDEXER = ".sa_indexer."
VISION = ("visual.", "mlp_AR.")
#: What checkpoints of other quantisers hold beside or in place of weights, and what wrote it.
_QUANTISERS = tuple((re.compile(pattern), tool) for pattern, tool in (
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    (r"\.SCB$|\.weight\.(absmax|quant_map|nested_absmax)$|\.weight_format$", "bitsandbytes"),
    (r"\.q_(weight|scale|scale_max|invperm|perm|groups|group_map)$", "EXL2"),
    (r"\.(trellis|suh|svh)$", "EXL3"),
    (r"\.W_q$", "HQQ or SINQ"),
    (r":_|_weight_qdata$", "torchao"),
    (r"\.weight\._(data|scale|shift)$", "quanto"),
    (r"\.codebooks$", "AQLM"),
    (r"\.weight_scale_2$", "ModelOpt"),
    (r"_proj_(blocks|scales)$", "a writer of MXFP4"),
    (r"\.weight_packed$|\.weight_scale(_inv)?$", "compressed-tensors or a writer of float8, with another config.json"),
    (r"\.scales$", "MLX, with another config.json"),
))  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")

#: The part of a module's tensor that a tensor of the files fills.
View = Callable[[Tensor], Tensor]


def find_quantiser(names: Iterable[str]) -> tuple[str, str] | None:
    """What has quantised a checkpoint, and the name of a tensor that tells it; None where none does."""
    listed = sorted(names)
    for pattern, tool in _QUANTISERS:
        if (name := next((name for name in listed if pattern.search(name)), None)) is not None:
            return tool, name
    return None


def is_draft(name: str, layers: int, drafts: int) -> bool:
    """Whether a tensor belongs to one of `drafts` layers for speculative decoding, which follow the `layers` of the
    decoder."""
    match = _LAYER.match(name)
    return match is not None and layers <= int(match[1]) < layers + drafts


def per_expert_modules(names: Iterable[str]) -> set[str]:
    """Names of the modules of experts that the files hold expert by expert."""
    return {match[1] for name in names if (match := _EXPERT.match(name))}


def file_tensors(name: str, shape: tuple[int, ...], per_expert: Collection[str]) -> Iterator[tuple[str, View]]:
    """The tensors of the files that make up a module's tensor: itself, or for fused experts one piece for each."""
    module, _, leaf = name.rpartition(".")
    if module not in per_expert or leaf not in ("gate_up_proj", "down_proj"):
        yield name, lambda t: t
        return
    inner = shape[2] // 2
    for e in range(shape[0]):
        if leaf == "down_proj":
            yield f"{module}.{e}.down_proj.weight", lambda t, e=e: t[e].t()  # type: ignore[misc]
        else:
            yield f"{module}.{e}.gate_proj.weight", lambda t, e=e: t[e, :, :inner].t()  # type: ignore[misc]
            yield f"{module}.{e}.up_proj.weight", lambda t, e=e: t[e, :, inner:].t()  # type: ignore[misc]
