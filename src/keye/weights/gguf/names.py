"""Names of tensors in GGUF files and their official names, both ways.

Most tensors differ by name alone. Others are put together: an official tensor is a `Recipe` of parts, each the rows of
a tensor in the file. Experts are written from the fused official tensors and read under the names of single experts,
which are stored the same way round. Writing uses one name for each part (`write_recipe`), reading accepts several
(`read_recipes`): the layout of an official Keye GGUF was never seen, so that indexer and projector are recognised by
shape where their names are not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keye.weights.gguf.reader import GGUFError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

#: GGUF name without `.weight` and `.bias` -> official name.
_TEXT: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: The same behind `blk.N.` and `model.layers.N.`; the second part is DeepSeek's attention and shared experts.
_LAYER: Final = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "indexer.k_proj": "self_attn.sa_indexer.k_proj", "indexer.q_norm": "self_attn.sa_indexer.q_norm",
    "indexer.k_norm": "self_attn.sa_indexer.k_norm",
}  # fmt: skip
#: The vision tower, behind `visual.vision_model.`, and the projector.
_TOWER: Final = {
    "v.patch_embd": "embeddings.patch_embedding", "v.position_embd": "embeddings.position_embedding",
    "v.packing_position_embd": "embeddings.packing_position_embedding", "v.post_ln": "post_layernorm",
}  # fmt: skip
_TOWER_LAYER: Final = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
_PROJECTOR: Final = {"mm.input_norm": "mlp_AR.pre_norm", "mm.1": "mlp_AR.linear_1", "mm.2": "mlp_AR.linear_2"}
_TOWER_PREFIX: Final = "visual.vision_model."
_PACKING: Final = f"{_TOWER_PREFIX}embeddings.packing_position_embedding.weight"

#: Other spellings of the indexer's tensors, without `attn_` before them: MSA's, DeepSeek's and transformers'.
_INDEXER_SPELLINGS: Final = {
    "q_proj": ("q_proj", "q", "q_b", "wq", "wq_b", "qw"), "proj": ("proj", "weights_proj", "weights", "gate", "w_proj"),
    "k_proj": ("k_proj", "k", "wk"), "q_norm": ("q_norm", "norm_q"), "k_norm": ("k_norm", "norm_k"),
}  # fmt: skip
_INDEXER: Final = re.compile(r"blk\.(\d+)\.(?:attn_|sa_)?indexer[._](?:attn_)?(.+)\.(weight|bias)")
#: In files of DeepSeek's models: the draft layer, which keye does not use.
_DRAFT: Final = re.compile(r"blk\.\d+\.nextn\.")
#: The pooling head of the tower, which no forward pass reads.
_POOLING: Final = re.compile(r"v\.(head|attn_pool|probe)\b")
#: Tables of llama.cpp that follow from the metadata.
_DERIVED: Final = re.compile(r"rope_freqs\.weight|blk\.\d+\.rope_freqs\.weight")


@dataclass(frozen=True)
class Part:
    """`rows` rows of a tensor in the file, from row `begin` on, which become the rows from `at` on of a layout. Rows
    are the second last dimension. `is_transposed`: after the two last dimensions of the tensor were exchanged.
    `expert`: of this matrix alone among the stacked ones."""

    tensor: str
    rows: int
    begin: int = 0
    at: int = 0
    is_transposed: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Recipe:
    """An official tensor of `shape` out of `parts` that fill `layout` [..., rows, columns]; the tensor is the layout
    with its two last dimensions exchanged where `is_transposed`, else the layout in another shape."""

    shape: Shape
    layout: Shape
    parts: tuple[Part, ...]
    is_transposed: bool = False


@dataclass(frozen=True)
class Sizes:
    """What splits official tensors: heads and size of a head of the indexer (0: none); DeepSeek's heads and the parts
    of a head in `kv_b_proj` (0: no such attention)."""

    indexer_heads: int = 0
    indexer_dim: int = 0
    heads: int = 0
    nope_dim: int = 0
    value_dim: int = 0


def plain(tensor: str, shape: Shape) -> Recipe:
    """A tensor that is stored as it is."""
    layout = (1, *shape) if len(shape) == 1 else shape if len(shape) < 4 else (shape[0], math.prod(shape[1:]))
    return Recipe(shape, layout, (Part(tensor, layout[-2]),))


# --------------------------------------------------------------------------------------------------------------------
# Writing


def write_recipe(name: str, shape: Shape, sizes: Sizes) -> Recipe | None:
    """How an official tensor is stored: the names in the file are those of `parts`, `shape` is the official one. None
    for a tensor that GGUF has no name for."""
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        return _write_layer(f"blk.{match[1]}.", match[2], shape, sizes)
    if match := re.fullmatch(rf"{_TOWER_PREFIX}encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        own = _reverse(_TOWER_LAYER).get(match[2])
        return None if own is None else plain(f"v.blk.{match[1]}.{own}.{match[3]}", shape)
    names = {**_reverse(_TEXT), **_reverse(_PROJECTOR)}
    names |= {_TOWER_PREFIX + official: own for official, own in _reverse(_TOWER).items()}
    return plain(f"{names[module]}.{leaf}", shape) if module in names else None


def _write_layer(prefix: str, rest: str, shape: Shape, sizes: Sizes) -> Recipe | None:
    if rest == "mlp.experts.gate_up_proj":
        inner = shape[-1] // 2
        return Recipe(shape, (shape[0], shape[2], shape[1]), (
            Part(f"{prefix}ffn_gate_exps.weight", inner), Part(f"{prefix}ffn_up_exps.weight", inner, at=inner),
        ), is_transposed=True)  # fmt: skip
    if rest == "mlp.experts.down_proj":
        return Recipe(
            shape,
            (shape[0], shape[2], shape[1]),
            (Part(f"{prefix}ffn_down_exps.weight", shape[2]),),
            is_transposed=True,
        )
    if rest == "mlp.gate.e_score_correction_bias":
        return plain(f"{prefix}exp_probs_b.bias", shape)
    if rest == "self_attn.sa_indexer.q_proj.weight":
        gates = sizes.indexer_heads
        rows = shape[0] - gates
        return Recipe(shape, shape, (
            Part(f"{prefix}indexer.q_proj.weight", rows), Part(f"{prefix}indexer.proj.weight", gates, at=rows),
        ))  # fmt: skip
    if rest == "self_attn.kv_b_proj.weight" and sizes.heads:
        layout = (sizes.heads, sizes.nope_dim + sizes.value_dim, shape[1])
        return Recipe(shape, layout, (
            Part(f"{prefix}attn_k_b.weight", sizes.nope_dim, is_transposed=True),
            Part(f"{prefix}attn_v_b.weight", sizes.value_dim, at=sizes.nope_dim),
        ))  # fmt: skip
    module, _, leaf = rest.rpartition(".")
    own = _reverse(_LAYER).get(module)
    return None if own is None or leaf not in ("weight", "bias") else plain(f"{prefix}{own}.{leaf}", shape)


def take_part(recipe: Recipe, part: Part, tensor: Tensor) -> Tensor:
    """What is stored of an official tensor under the name of `part`: a view of it."""
    layout = tensor.transpose(-1, -2) if recipe.is_transposed else tensor.view(recipe.layout)
    rows = layout[..., part.at : part.at + part.rows, :]
    if len(recipe.parts) == 1:
        return rows if recipe.is_transposed else tensor
    return rows.transpose(-1, -2) if part.is_transposed else rows


def _reverse(names: Mapping[str, str]) -> dict[str, str]:
    return {official: own for own, official in names.items()}


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read_recipes(tensors: Shapes, sizes: Sizes, where: str) -> dict[str, Recipe]:
    """Official name -> how it is put together, of the tensors of a language model by their names in the file. `where`
    begins the sentence of an error: `GGUFError` that names every tensor whose place is not known, and halves of a
    tensor without the other."""
    recipes: dict[str, Recipe] = {}
    groups: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for name, shape in tensors.items():
        if _DRAFT.match(name) or _DERIVED.fullmatch(name):
            continue
        if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in _EXPERTS and len(shape) == 3:
            recipes |= _experts(name, shape, match[1], _EXPERTS[match[2]])
        elif (grouped := _group_of(name, shape, sizes)) is not None:
            official, role = grouped
            if role in groups.setdefault(official, {}):
                raise GGUFError(f"{where} has two tensors for {official}: {groups[official][role]} and {name}")
            groups[official][role] = name
        elif (plain_name := _plain_name(name)) is not None:
            recipes[plain_name] = plain(name, shape)
        else:
            unknown.append(name)
    if unknown:
        raise GGUFError(f"{where} has tensors whose place keye does not know: {_listed(unknown)}")
    for official, roles in groups.items():
        recipes[official] = _join(official, {role: (name, tensors[name]) for role, name in roles.items()}, sizes, where)
    return recipes


def _listed(names: list[str]) -> str:
    return ", ".join(name[:80] for name in sorted(names)[:20]) + (
        f" and {len(names) - 20} more" if len(names) > 20 else ""
    )


def _plain_name(name: str) -> str | None:
    """The official name of a tensor that is stored as it is."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if stem in _TEXT:
        return f"{_TEXT[stem]}.{leaf}"
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if match is None:
        return None
    if match[2] == "exp_probs_b":
        return f"model.layers.{match[1]}.mlp.gate.e_score_correction_bias"
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{leaf}" if match[2] in _LAYER else None


_EXPERTS: Final = {"ffn_gate_exps": ("gate",), "ffn_up_exps": ("up",), "ffn_gate_up_exps": ("gate", "up"),
                   "ffn_down_exps": ("down",)}  # fmt: skip
_LATENT: Final = {"attn_k_b": "k_b", "attn_v_b": "v_b"}


def _experts(name: str, shape: Shape, layer: str, projections: tuple[str, ...]) -> dict[str, Recipe]:
    """Every matrix of stacked experts [E, M, K], or of two projections above one another [E, 2M, K]."""
    rows = shape[1] // len(projections)
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight": Recipe(
            (rows, shape[2]), (rows, shape[2]), (Part(name, rows, begin=number * rows, expert=expert),)
        )
        for expert in range(shape[0])
        for number, projection in enumerate(projections)
    }


def _group_of(name: str, shape: Shape, sizes: Sizes) -> tuple[str, str] | None:
    """The official tensor that a tensor is a part of, and which; None for one that is stored as it is."""
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in _LATENT:
        return f"model.layers.{match[1]}.self_attn.kv_b_proj.weight", _LATENT[match[2]]
    if (match := _INDEXER.fullmatch(name)) is None or not sizes.indexer_heads:
        return None
    role = _indexer_role(match[2], shape, sizes)
    if role is None:
        return None
    prefix = f"model.layers.{match[1]}.self_attn.sa_indexer."
    if role in ("q_proj", "proj"):
        return f"{prefix}q_proj.weight", role
    return f"{prefix}{role}.{match[3]}", "itself"


def indexer_sizes(tensors: Shapes, where: str) -> tuple[int, int]:
    """Heads of the indexer and the size of one, from the shapes of its tensors in the first layer that has them: the
    size is that of its norms, the heads follow from the rows of queries and gates."""
    layers: dict[int, list[Shape]] = {}
    for name, shape in tensors.items():
        if (match := _INDEXER.fullmatch(name)) is not None:
            layers.setdefault(int(match[1]), []).append(shape)
    shapes = layers[min(layers)] if layers else []
    sizes = {shape[0] for shape in shapes if len(shape) == 1}
    if len(sizes) == 1:
        size = sizes.pop()
        rows = sorted(shape[0] for shape in shapes if len(shape) == 2)
        if size in rows:
            rows.remove(size)
        if len(rows) == 1 and rows[0] % (size + 1) == 0:
            return rows[0] // (size + 1), size
        if len(rows) == 2 and rows[0] * size == rows[1]:
            return rows[0], size
    raise GGUFError(f"{where} has an indexer whose heads neither its metadata nor its shapes tell; convert it again")


def _indexer_role(spelling: str, shape: Shape, sizes: Sizes) -> str | None:
    """Which of the indexer's tensors this is: by its shape where only one fits, else by its name too."""
    heads, size = sizes.indexer_heads, sizes.indexer_dim
    named = next((role for role, known in _INDEXER_SPELLINGS.items() if spelling in known), None)
    if len(shape) == 1:
        if named in ("q_norm", "k_norm"):
            return named
        last = [letter for letter in spelling.replace("norm", "") if letter in "qk"]
        return f"{last[0]}_norm" if len(last) == 1 and shape[0] == size else None
    rows = {"q_proj": (heads * size, heads * size + heads), "proj": (heads,), "k_proj": (size,)}
    fitting = [role for role, counts in rows.items() if shape[0] in counts]
    return named if named in fitting else fitting[0] if len(fitting) == 1 else None


def _join(official: str, roles: Mapping[str, tuple[str, Shape]], sizes: Sizes, where: str) -> Recipe:
    """The recipe of an official tensor out of the parts that the file has."""
    if "itself" in roles:
        return plain(*roles["itself"])
    if official.endswith("q_proj.weight"):
        has_gates = roles.get("q_proj", ("", (0,)))[1][0] == sizes.indexer_heads * (sizes.indexer_dim + 1)
        wanted = ["q_proj"] if has_gates else ["q_proj", "proj"]
    else:
        wanted = ["k_b", "v_b"]
    if lacking := [role for role in wanted if role not in roles]:
        present = next(iter(roles.values()))[0]
        raise GGUFError(f"{where} has {present} but not its other part ({lacking[0]}) for {official}; convert it again")
    parts = [roles[role] for role in wanted]
    if wanted == ["k_b", "v_b"]:
        (k, k_shape), (v, v_shape) = parts
        if len(k_shape) != 3 or len(v_shape) != 3 or (k_shape[0], k_shape[1]) != (v_shape[0], v_shape[2]):
            raise GGUFError(f"{where} has {k} {list(k_shape)} and {v} {list(v_shape)}, which do not fit together")
        layout = (k_shape[0], k_shape[2] + v_shape[1], k_shape[1])
        return Recipe((layout[0] * layout[1], layout[2]), layout, (
            Part(k, k_shape[2], is_transposed=True), Part(v, v_shape[1], at=k_shape[2]),
        ))  # fmt: skip
    if any(len(shape) != 2 or shape[1] != parts[0][1][1] for _, shape in parts):
        listed = " and ".join(f"{name} {list(shape)}" for name, shape in parts)
        raise GGUFError(f"{where} has {listed}, which do not fit together; convert the model again")
    placed, rows = [], 0
    for name, shape in parts:
        placed.append(Part(name, shape[0], at=rows))
        rows += shape[0]
    shape = (rows, parts[0][1][1])
    return Recipe(shape, shape, tuple(placed))


def read_vision_recipes(tensors: Shapes, where: str) -> dict[str, Recipe]:
    """Like `read_recipes`, of an mmproj file. The matrices and the norm of the projector count by their order and
    shape, whatever they are called; a table as wide as the tower that is not the positions is the packing table, which
    no forward pass reads."""
    recipes: dict[str, Recipe] = {}
    rest: dict[str, Shape] = {}
    width = tensors.get("v.patch_embd.weight", (0,))[0]
    for name, shape in tensors.items():
        stem, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if stem in _TOWER and leaf in ("weight", "bias"):
            recipes[f"{_TOWER_PREFIX}{_TOWER[stem]}.{leaf}"] = _as_patches(name, shape, stem)
        elif match is not None and match[2] in _TOWER_LAYER:
            official = f"{_TOWER_PREFIX}encoder.layers.{match[1]}.{_TOWER_LAYER[match[2]]}.{match[3]}"
            recipes[official] = plain(name, shape)
        elif match is not None and match[2] == "attn_qkv":
            recipes |= _split_qkv(name, shape, f"{_TOWER_PREFIX}encoder.layers.{match[1]}.self_attn", match[3])
        elif len(shape) == 2 and shape[1] == width and match is None and _PACKING not in recipes:
            recipes[_PACKING] = plain(name, shape)
        elif not _POOLING.match(name):
            rest[name] = shape
    recipes |= _projector(rest, width)
    if unknown := list(set(rest) - {part.tensor for recipe in recipes.values() for part in recipe.parts}):
        raise GGUFError(f"{where} has tensors whose place keye does not know: {_listed(unknown)}")
    return _exchange_mlp(recipes)


def _as_patches(name: str, shape: Shape, stem: str) -> Recipe:
    """The convolution that reads patches also where it is stored as a matrix [width, 3 * side * side]."""
    if stem == "v.patch_embd" and len(shape) == 2:
        side = math.isqrt(shape[1] // 3)
        return (
            Recipe((shape[0], 3, side, side), shape, (Part(name, shape[0]),))
            if side * side * 3 == shape[1]
            else plain(name, shape)
        )
    return plain(name, shape)


def _split_qkv(name: str, shape: Shape, module: str, leaf: str) -> dict[str, Recipe]:
    """Queries, keys and values that are stored as one matrix or one bias."""
    size = shape[0] // 3
    third = (size, *shape[1:])
    return {
        f"{module}.{letter}_proj.{leaf}": Recipe(
            third, (size, math.prod(shape[1:])), (Part(name, size, number * size),)
        )
        for number, letter in enumerate("qkv")
    }


def _projector(tensors: Shapes, width: int) -> dict[str, Recipe]:
    """Norm and two matrices of the projector of a tower of `width`, by shape, and by the numbers in their names where
    both matrices are square."""

    def order(name: str) -> tuple[bool, list[int]]:
        return len(set(tensors[name])) > 1, [int(number) for number in re.findall(r"\d+", name)]

    weights = [name for name in tensors if name.endswith(".weight")]
    matrices = sorted((n for n in weights if len(tensors[n]) == 2 and tensors[n][1] > width), key=order)
    norms = [name for name in weights if len(tensors[name]) == 1]
    if len(matrices) != 2 or len(norms) != 1:
        return {}
    recipes = {}
    for weight, official in zip((*norms, *matrices), _PROJECTOR.values(), strict=True):
        recipes[f"{official}.weight"] = plain(weight, tensors[weight])
        bias = weight.removesuffix("weight") + "bias"
        if bias in tensors:
            recipes[f"{official}.bias"] = plain(bias, tensors[bias])
    return recipes


def _exchange_mlp(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Old converters of llama.cpp called the first matrix of a tower's MLP ffn_down: the shapes decide."""
    for name, recipe in list(recipes.items()):
        if name.endswith(".mlp.fc1.weight") and len(recipe.shape) == 2 and recipe.shape[0] < recipe.shape[1]:
            for leaf in ("weight", "bias"):
                first, second = (
                    name.removesuffix("weight") + leaf,
                    name.replace("fc1", "fc2").removesuffix("weight") + leaf,
                )
                if first in recipes and second in recipes:
                    recipes[first], recipes[second] = recipes[second], recipes[first]
    return recipes
