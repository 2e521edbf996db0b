"""LoRA adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors` in one folder.

Only safetensors are opened, nothing in a file can run, and the patterns of its configuration are compared as plain
names. Everything is checked by names and shapes before a number is read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from keye.config import read_json
from keye.errors import KeyeError, is_number, is_whole
from keye.models.adapters import Adapter, EmbeddingLowRank, ExpertsLowRank, LowRank
from keye.models.moe import MoE, Router
from keye.weights.safetensors import StoredTensor, open_file

CONFIG_FILE: Final = "adapter_config.json"
TENSORS_FILE: Final = "adapter_model.safetensors"
#: Largest configuration that is read, and most of its patterns.
MAX_CONFIG_BYTES: Final = 4 << 20
MAX_PATTERNS: Final = 10_000
MAX_RANK: Final = 4096
#: The end of the names of base layers that PEFT copies beside the pairs of embeddings and heads, which it never trains.
_COPY: Final = ".base_layer.weight"
#: What PEFT puts before the names of the model, and beginnings of names in other libraries with those of keye.
_PREFIX: Final = "base_model.model."
_BEGINNINGS: Final = (
    ("network.", ""), ("model.language_model.", "model."), ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"), ("model.visual.", "visual."), ("model.mlp_AR.", "mlp_AR."),
    ("vision_tower.", "visual.vision_model."),
)  # fmt: skip
_TENSOR: Final = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(\.weight)?")
_EXPERT: Final = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d{1,6})\.(?P<own>gate_proj|up_proj|down_proj)")
#: The fused parameters of experts, and the layers of single experts that each holds.
_FUSED: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
#: A pattern of ranks that is only a name: letters and dots, which may be escaped. All else is an expression.
_PLAIN_PATTERN: Final = re.compile(r"\^?(?:\w|\\?\.)+\$?")
#: Switches that change what an adapter computes; each must be absent or as in plain LoRA.
_MUST_BE_OFF: Final = {
    "use_dora": "DoRA scales whole columns of the weights", "use_qalora": "QALoRA pools the inputs",
    "lora_bias": "biases of adapters are not read", "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "activated LoRA begins in the middle of a prompt",
    "trainable_token_indices": "it replaces embeddings of single tokens",
    "use_bdlora": "BD-LoRA has blocks of its own", "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights", "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA has a product of its own", "megatron_config": "it belongs to sharded layers of Megatron",
}  # fmt: skip
#: Initialisations that change the weights of the base: the adapter suits only the changed ones.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterError(KeyeError):
    """An adapter cannot be read, or is one of another model."""


@dataclass(frozen=True)
class LoraConfig:
    """What `adapter_config.json` says of ranks and scales. `base` is the name of the model that it was trained on."""

    rank: int
    alpha: float
    root: bool
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None

    @classmethod
    def from_file(cls, file: Path) -> LoraConfig:
        """`AdapterError` for a configuration that is not plain LoRA, and says what it is."""
        if not file.is_file():
            raise AdapterError(f"{file.parent} holds no {CONFIG_FILE}: give a folder that PEFT's save_pretrained wrote")
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{file} has more than {MAX_CONFIG_BYTES:,} bytes, which no configuration has")
        raw = read_json(file)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"{file} is of the type {str(kind)[:60]!r}: keye reads LoRA adapters")
        for name, why in _MUST_BE_OFF.items():
            if raw.get(name):
                raise AdapterError(f"{file} sets {name} ({why}), which keye does not read: merge the adapter with PEFT "
                                   "and load the merged model")  # fmt: skip
        if raw.get("modules_to_save"):
            raise AdapterError(f"{file} sets modules_to_save, whole layers beside the adapter: merge it with PEFT and "
                               "load the merged model")  # fmt: skip
        if raw.get("bias", "none") != "none":
            raise AdapterError(f"{file} has bias {str(raw['bias'])[:60]!r}, which changes the base: merge it with PEFT "
                               "and load the merged model")  # fmt: skip
        begun = str(raw.get("init_lora_weights") or "").lower()
        if begun.startswith(_CHANGES_BASE):
            raise AdapterError(f"{file} was begun by {begun[:40]}, which changed the weights of its base: convert it "
                               "with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip
        if not is_whole(raw.get("r")) or not 1 <= raw["r"] <= MAX_RANK:
            raise AdapterError(f"{file} has r {str(raw.get('r'))[:60]!r}: a rank is 1 to {MAX_RANK:,}")
        if not is_number(raw.get("lora_alpha")):
            raise AdapterError(f"{file} has lora_alpha {str(raw.get('lora_alpha'))[:60]!r}, which is not a number")
        base, root = raw.get("base_model_name_or_path"), raw.get("use_rslora") or False
        if not isinstance(root, bool):
            raise AdapterError(f"{file} has use_rslora {str(root)[:60]!r}, which is neither true nor false")
        return cls(
            raw["r"], float(raw["lora_alpha"]), root, _patterns(raw, "rank_pattern", file),
            _patterns(raw, "alpha_pattern", file), base[:200] if isinstance(base, str) else None,
        )  # fmt: skip

    def rank_of(self, key: str) -> int:
        """The rank of what PEFT calls `key`: the name of a module, or of a parameter."""
        return int(_lookup(self.ranks, key, self.rank))

    def scale_of(self, key: str) -> float:
        """The factor of its product."""
        rank = self.rank_of(key)
        return _lookup(self.alphas, key, self.alpha) / (math.sqrt(rank) if self.root else rank)


def _patterns(raw: Mapping[str, Any], name: str, file: Path) -> dict[str, float]:
    values = raw.get(name) or {}
    if not isinstance(values, Mapping) or len(values) > MAX_PATTERNS:
        raise AdapterError(f"{file} has a {name} that is not an object of at most {MAX_PATTERNS:,} entries")
    plain: dict[str, float] = {}
    for key, value in values.items():
        if len(key) > 300 or not _PLAIN_PATTERN.fullmatch(key):
            raise AdapterError(f"{file} has {key[:80]!r} in {name}: keye reads names of layers there, no expressions")
        is_rank = name == "rank_pattern"
        if not is_number(value) or (is_rank and not (is_whole(value) and 1 <= value <= MAX_RANK)):
            raise AdapterError(f"{file} has {str(value)[:60]!r} for {key} in {name}, which is not a valid number")
        plain[key.rstrip("$").replace("\\", "")] = value
    return plain


def _lookup(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that is the end of a module's name, or with ^ all of it, as PEFT looks it up."""
    return next((value for key, value in patterns.items() if _fits(key, module)), default)


def _fits(pattern: str, module: str) -> bool:
    name = pattern.removeprefix("^")
    return module == name or (name == pattern and module.endswith(f".{name}"))


# --------------------------------------------------------------------------------------------------------------------
# Names and shapes


@dataclass(frozen=True)
class _Pair:
    """Two tensors of the files, [R, in] and [out, R], under the name that PEFT gives their module. `key` is what it
    looks up ranks and scales by."""

    module: str
    a: StoredTensor
    b: StoredTensor
    embeds: bool = False
    key: str = ""


def read_adapter(
    folder: Path, name: str, model: nn.Module, *, dtype: torch.dtype, device: torch.device,
    reserve: Callable[[int], None] = lambda _: None,
) -> Adapter:  # fmt: skip
    """Reads the adapter in `folder` for `model`, whose layers it must fit. `reserve` is called with the bytes that it
    will take, before any of it is read. `AdapterError` in one sentence for whatever does not fit."""
    config = LoraConfig.from_file(folder / CONFIG_FILE)
    file = folder / TENSORS_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle, which keye does not open: save it with safe_serialization=True"
        raise AdapterError(f"{folder} holds no {TENSORS_FILE}" + (f"; {hint}" if pickled else ""))
    layout = _Layout(model, config, folder)
    tensors = open_file(file)
    copies = {name: tensor for name, tensor in tensors.items() if name.endswith(_COPY)}
    for pair in _pairs({name: tensor for name, tensor in tensors.items() if name not in copies}, file):
        layout.place(pair)
    for name, tensor in copies.items():
        layout.check_copy(name, tensor.shape)
    nbytes = layout.count_numbers() * dtype.itemsize
    reserve(nbytes)
    reader = _Reader(config, dtype, device)
    layers = {own: reader.read_layer(pair, layout.modules[own]) for own, pair in sorted(layout.layers.items())}
    experts = {own: reader.read_experts(layout, own) for own in sorted(layout.experts)}
    return Adapter(name, layers, experts, reader.digest.hexdigest(), nbytes)


def _pairs(tensors: Mapping[str, StoredTensor], file: Path) -> Iterator[_Pair]:
    halves: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise AdapterError(f"{file} holds {name[:200]}, {_explain(name)}")
        if not tensor.is_readable or len(tensor.shape) != 2:
            shape = list(tensor.shape)
            raise AdapterError(f"{file} has {name[:200]} as {tensor.dtype} {shape}, which is not a matrix of numbers")
        halves[match["module"]][match["kind"]] = tensor
    for module, kinds in halves.items():
        if kinds.keys() == {"A", "B"}:
            yield _Pair(module, kinds["A"], kinds["B"])
        elif kinds.keys() == {"embedding_A", "embedding_B"}:
            yield _Pair(module, kinds["embedding_A"], kinds["embedding_B"], embeds=True)
        else:
            raise AdapterError(f"{file} has lora_{' and lora_'.join(sorted(kinds))} of {module[:200]} without the other"
                               " half; save the adapter again")  # fmt: skip
    if not halves:
        raise AdapterError(f"{file} holds no tensors; save the adapter again")


def _explain(name: str) -> str:
    """What a tensor outside of all pairs is, and what to do."""
    if "lora_magnitude" in name:
        return "DoRA's magnitudes: keye reads plain LoRA adapters"
    if name.endswith((_COPY, "embed_tokens.weight", "lm_head.weight")):
        return ("a whole layer beside the adapter: save it with save_embedding_layers=False, or merge the adapter with "
                "PEFT where that layer was trained")  # fmt: skip
    return "no matrix of a LoRA adapter: keye reads plain LoRA adapters"


class _Layout:
    """The pairs of an adapter by the modules that they change: `layers` by name, and `experts` by name and by what they
    change there, a fused parameter or one layer of one expert, as "3.up_proj"."""

    def __init__(self, model: nn.Module, config: LoraConfig, folder: Path) -> None:
        self.modules, self.config, self.folder = dict(model.named_modules()), config, folder
        self.layers: dict[str, _Pair] = {}
        self.experts: dict[str, dict[str, _Pair]] = defaultdict(dict)

    def place(self, pair: _Pair) -> None:
        """Finds what a pair changes, and compares its shapes."""
        name = self._own_name(pair.module)
        match = _EXPERT.fullmatch(name)
        if match is not None and match["experts"] in self.modules:
            self._place_expert(pair, match)
        elif (experts := name.removesuffix(".base_layer")).endswith(".experts") and experts in self.modules:
            self._place_experts(pair, experts)
        else:
            sizes = _sizes(name, self.modules.get(name), pair.embeds)
            if sizes is None and name in self.modules:
                raise AdapterError(f"{self.folder} changes {name[:200]}, a layer that takes no adapter here: merge it "
                                   "with PEFT and load the merged model")  # fmt: skip
            if sizes is None:
                raise self._foreign(f"changes {pair.module[:200]}, where the model has no linear layer")
            key = pair.module.removeprefix(_PREFIX)
            rank = self.config.rank_of(key)
            self._add(self.layers, name, replace(pair, key=key), (rank, sizes[1]), (sizes[0], rank))

    def check_copy(self, name: str, shape: tuple[int, ...]) -> None:
        """`AdapterError` for the copy of a base layer that has no pair here, or another shape."""
        pair = self.layers.get(self._own_name(name.removesuffix(_COPY)))
        if pair is None:
            raise AdapterError(f"{self.folder / TENSORS_FILE} holds {name[:200]}, {_explain(name)}")
        sizes = (pair.b.shape[0], pair.a.shape[1])
        if shape != (sizes[::-1] if pair.embeds else sizes):
            raise self._foreign(f"has {list(shape)} for {name[:200]}, where the model has {list(sizes)}")

    def expert_sizes(self, name: str) -> tuple[int, int, int]:
        """E, d, I."""
        moe = self.modules[name.rpartition(".")[0]]
        assert isinstance(moe, MoE)
        return moe.experts.sizes

    def count_numbers(self) -> int:
        """Numbers that the adapter will have in memory."""
        count = sum(math.prod(tensor.shape) for pair in self.layers.values() for tensor in (pair.a, pair.b))
        for name, pairs in self.experts.items():
            E, d, inner = self.expert_sizes(name)
            fused = [pair for own, pair in pairs.items() if own in _FUSED]
            count += sum(math.prod(tensor.shape) for pair in fused for tensor in (pair.a, pair.b))
            for own, width in (("gate_proj", d + 2 * inner), ("up_proj", d + 2 * inner), ("down_proj", d + inner)):
                count += E * width * _largest_rank(pairs, own)
        return count

    def _own_name(self, module: str) -> str:
        """The name of a module in keye."""
        name = module.removeprefix(_PREFIX)
        for theirs, ours in (("", ""), *_BEGINNINGS):
            if name.startswith(theirs):
                own = ours + name.removeprefix(theirs)
                match = _EXPERT.fullmatch(own)
                if own.removesuffix(".base_layer") in self.modules or (match and match["experts"] in self.modules):
                    return own
        return name

    def _place_expert(self, pair: _Pair, match: re.Match[str]) -> None:
        """A pair of one expert's linear layer."""
        E, d, inner = self.expert_sizes(match["experts"])
        if int(match["number"]) >= E:
            raise self._foreign(f"changes expert {match['number']} of {match['experts']}, which has {E}")
        key = pair.module.removeprefix(_PREFIX)
        rank = self.config.rank_of(key)
        columns, rows = (inner, d) if match["own"] == "down_proj" else (d, inner)
        own = f"{int(match['number'])}.{match['own']}"
        self._add(self.experts[match["experts"]], own, replace(pair, key=key), (rank, columns), (rows, rank))

    def _place_experts(self, pair: _Pair, name: str) -> None:
        """A pair of a fused parameter; only its shape says which one it is."""
        E, d, inner = self.expert_sizes(name)
        by_shape = {frozenset((d, 2 * inner)): "gate_up_proj", frozenset((inner, d)): "down_proj"}
        own = by_shape.get(frozenset((pair.a.shape[1], pair.b.shape[0])))
        if own is None:
            raise self._foreign(f"has {list(pair.b.shape)} x {list(pair.a.shape)} for {pair.module[:200]}, where the "
                                f"model's experts are {E} of {d} x {2 * inner} and {inner} x {d}")  # fmt: skip
        key = f"{pair.module.removeprefix(_PREFIX).removesuffix('.base_layer')}.{own}"
        rank = E * self.config.rank_of(key)
        shapes = (rank, pair.a.shape[1]), (pair.b.shape[0], rank)
        self._add(self.experts[name], own, replace(pair, key=key), *shapes)

    def _add(self, pairs: dict[str, _Pair], own: str, pair: _Pair, a: tuple[int, int], b: tuple[int, int]) -> None:
        if own in pairs:
            raise AdapterError(f"{self.folder} has {pair.module[:200]} twice, under two names; save it again")
        if pair.a.shape != a or pair.b.shape != b:
            raise self._foreign(f"has {list(pair.b.shape)} x {list(pair.a.shape)} for {pair.module[:200]}, where the "
                                f"model and the rank of {CONFIG_FILE} need {list(b)} x {list(a)}")  # fmt: skip
        pairs[own] = pair

    def _foreign(self, what: str) -> AdapterError:
        base = f" (it names {self.config.base})" if self.config.base else ""
        return AdapterError(f"{self.folder} {what}: it was made for another model{base}")


def _sizes(name: str, layer: object, embeds: bool) -> tuple[int, int] | None:
    """Outputs and inputs of a layer that can be adapted: of the embeddings of tokens, their width and number."""
    names = ("embedding_dim", "num_embeddings") if embeds else ("out_features", "in_features")
    if embeds and not name.endswith("embed_tokens"):
        return None
    sizes = tuple(getattr(layer, name, None) for name in names)
    return None if None in sizes else sizes  # type: ignore[return-value]


def _largest_rank(pairs: Mapping[str, _Pair], own: str) -> int:
    """Of the layers of single experts that are called `own`; 0 without any."""
    return max((pair.a.shape[0] for key, pair in pairs.items() if key.endswith(f".{own}")), default=0)


# --------------------------------------------------------------------------------------------------------------------
# Numbers


@dataclass
class _Reader:
    """Reads pairs in the dtype and onto the device of a model; `digest` is of all that was read."""

    config: LoraConfig
    dtype: torch.dtype
    device: torch.device
    digest: Any = field(default_factory=hashlib.sha256)

    def read_layer(self, pair: _Pair, layer: nn.Module) -> LowRank | EmbeddingLowRank:
        a, b = self._read(pair)
        dtype = torch.float32 if isinstance(layer, Router) else self.dtype
        if pair.embeds:
            return EmbeddingLowRank(a.t().to(self.device, dtype).contiguous(), b.to(self.device, dtype))
        return LowRank(a.to(self.device, dtype), b.to(self.device, dtype))

    def read_experts(self, layout: _Layout, name: str) -> ExpertsLowRank:
        """The pairs of all experts of a layer."""
        sizes, pairs = layout.expert_sizes(name), layout.experts[name]
        products: dict[str, tuple[Tensor, Tensor]] = {}
        for own, singles in _FUSED.items():
            by_expert = sorted(key for key in pairs if key.partition(".")[2] in singles)
            if own in pairs and by_expert:
                raise AdapterError(f"{layout.folder} changes {name} both as a whole and expert by expert")
            if own in pairs:
                products[own] = self._read_fused(pairs[own], sizes[0], sizes[1] if own == "gate_up_proj" else sizes[2])
            elif by_expert:
                products[own] = self._join({key: pairs[key] for key in by_expert}, singles, sizes)
        return ExpertsLowRank(products.get("gate_up_proj"), products.get("down_proj"))

    def _read_fused(self, pair: _Pair, experts: int, inputs: int) -> tuple[Tensor, Tensor]:
        """[E * R, in] and [out, R * E] as [E, R, in] and [E, out, R]."""
        a, b = self._read(pair)
        a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
        # PEFT takes fused experts for [E, out, in] unless their module says otherwise; those of Keye are [E, in, out].
        if a.shape[2] != inputs or a.shape[2] == b.shape[1]:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a.to(self.device, self.dtype).contiguous(), b.to(self.device, self.dtype).contiguous()

    def _join(
        self, pairs: Mapping[str, _Pair], singles: tuple[str, ...], sizes: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """Pairs of single experts as one of all: gate and up have ranks of their own, all else is 0."""
        E, d, inner = sizes
        inputs, outputs, rows = (inner, d, d) if singles == ("down_proj",) else (d, 2 * inner, inner)
        ranks = [_largest_rank(pairs, own) for own in singles]
        down = torch.zeros(E, sum(ranks), inputs, dtype=self.dtype, device=self.device)
        up = torch.zeros(E, outputs, sum(ranks), dtype=self.dtype, device=self.device)
        for key, pair in pairs.items():
            number, _, own = key.partition(".")
            place, (a, b) = singles.index(own), self._read(pair)
            ranked = slice(first := sum(ranks[:place]), first + a.shape[0])
            down[int(number), ranked] = a.to(self.device, self.dtype)
            up[int(number), place * rows : (place + 1) * rows, ranked] = b.to(self.device, self.dtype)
        return down, up

    def _read(self, pair: _Pair) -> tuple[Tensor, Tensor]:
        """Both matrices in float32, the scale in the second one."""
        a, b = pair.a.read().float(), pair.b.read().float() * self.config.scale_of(pair.key)
        for matrix in (a, b):
            if not bool(matrix.isfinite().all()):
                sentence = f"{pair.a.file} has numbers in {pair.module[:200]} that are not finite; save it again"
                raise AdapterError(sentence)
            self.digest.update(f"{pair.key} {tuple(matrix.shape)}\n".encode() + matrix.numpy().tobytes())
        return a, b
