"""Which part of a model takes which format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keye.errors import KeyeError
from keye.ops.quantized import QuantFormat, QuantKind

#: Parts whose matrices are quantised, by the names of their tensors; the first match counts.
PARTS: Final = (
    ("vision tower", re.compile(r"^visual\.")),
    ("projector", re.compile(r"^mlp_AR\.")),
    ("embeddings", re.compile(r"\.embed_tokens\.")),
    ("indexer", re.compile(r"\.sa_indexer\.")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("experts", re.compile(r"\.mlp\.experts\.")),
    ("shared experts", re.compile(r"\.mlp\.shared_experts\.")),
    ("dense layers", re.compile(r"\.mlp\.(gate|up|down)_proj\.")),
    ("head", re.compile(r"^lm_head\.")),
)
#: What stays in high precision: few numbers, and the choice of experts, where a rounding error picks another one.
FLOAT: Final = (
    ("router", re.compile(r"\.mlp\.gate\.")),
    ("expansion of latents, used from both sides", re.compile(r"\.kv_b_proj\.")),
    ("norms", re.compile(r"norm\d?\.")),
    ("biases", re.compile(r"bias$")),
    ("patch projection and position table", re.compile(r"^visual\..*\.(patch|position)_embedding\.")),
)
#: Largest share of a model's bytes that may stay in high precision without standing in `FLOAT` or in the policy.
UNLISTED: Final = 0.01
#: Parts that are small and sensitive: int8 also where the others are int4.
_CAREFUL: Final = ("vision tower", "projector", "indexer")
#: Inputs that share a scale by default; None is a whole row.
GROUPS: Final[Mapping[QuantKind, int | None]] = {"int4": 64, "int8": None, "fp8": None}
#: Sizes of groups that int4 may have.
INT4_GROUPS: Final = (32, 64, 128)


@dataclass(frozen=True)
class Policy:
    """`parts` has the format of each part of `PARTS`, None where its matrices stay as they are."""

    kind: QuantKind
    parts: Mapping[str, QuantFormat | None]

    def format_of(self, name: str) -> QuantFormat | None:
        """The format of a matrix by the official name of its tensor, None where it is not quantised."""
        if any(pattern.search(name) for _, pattern in FLOAT):
            return None
        part = quantised_part(name)
        return None if part is None else self.parts.get(part)

    def place_of(self, name: str) -> tuple[str, bool]:
        """The part that a tensor in high precision belongs to, and whether it is listed to stay so."""
        for part, pattern in FLOAT:
            if pattern.search(name):
                return part, True
        own = quantised_part(name)
        return own or "other", own is not None and self.parts.get(own, self) is None

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {
            "quant_method": "keye", "version": 1, "kind": self.kind,
            "parts": {part: None if form is None else form.to_dict() for part, form in self.parts.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Policy:
        """The section `quantization_config` of a folder that keye wrote; `KeyeError` where it is of no version that
        this one reads."""
        known, parts = {part for part, _ in PARTS}, value.get("parts")
        if value.get("version") != 1 or not isinstance(parts, Mapping) or not set(parts) <= known:
            raise KeyeError("config.json has a quantization_config of another version of keye: quantise the original "
                            "again, or update keye")  # fmt: skip
        kind = next((kind for kind in GROUPS if kind == value.get("kind")), None)
        if kind is None:
            raise KeyeError(f"quantization_config has the kind {value.get('kind')!r}; it is int4, int8 or fp8")
        formats = {part: None if form is None else QuantFormat.from_dict(form) for part, form in parts.items()}
        return cls(kind, formats)


def make_policy(
    kind: str, group: int | None = None, overrides: Mapping[str, QuantFormat | None] | None = None
) -> Policy:
    """The formats of `int4`, `int8` or `fp8`: everything in it, but in int4 the vision tower, projector and indexer in
    int8. `group` inputs share a scale (default: 64 in int4, the row in others); `overrides` are formats of parts."""
    kinds = {str(known): known for known in GROUPS}
    if kind not in kinds:
        raise KeyeError(f"{kind!r} is not a format of weights; choose one of {', '.join(kinds)}")
    chosen = kinds[kind]
    form, careful = make_format(chosen, group), QuantFormat("int8") if kind == "int4" else make_format(chosen, group)
    parts: dict[str, QuantFormat | None] = {name: careful if name in _CAREFUL else form for name, _ in PARTS}
    if unknown := sorted(set(overrides or {}) - set(parts)):
        raise KeyeError(f"a model has no part {unknown[0]!r}; choose one of {', '.join(parts)}")
    return Policy(chosen, {**parts, **(overrides or {})})


def make_format(kind: QuantKind, group: int | None = None) -> QuantFormat:
    """A format with scales for `group` inputs; `KeyeError` for sizes that kernels do not take."""
    if kind == "int4" and group not in (None, *INT4_GROUPS):
        raise KeyeError(f"{group} inputs cannot share a scale in int4; choose 32, 64 or 128")
    if group is not None and (group < 16 or group % 16):
        raise KeyeError(f"{group} inputs cannot share a scale; choose a multiple of 16")
    return QuantFormat(kind, group or GROUPS[kind])


def parse_part(text: str) -> tuple[str, QuantFormat | None]:
    """`head=int8`, `experts=int4:32` or `indexer=keep`: a part and its format, None where it stays as it is."""
    part, equals, wanted = text.partition("=")
    kind, colon, group = wanted.partition(":")
    kinds = {str(known): known for known in GROUPS}
    if not equals or (kind != "keep" and kind not in kinds) or (colon and not (group.isdecimal() and kind in kinds)):
        raise KeyeError(f"{text!r} does not name a part and its format; write head=int8, experts=int4:32 or head=keep")
    return part.strip().replace("-", " "), None if kind == "keep" else make_format(kinds[kind], int(group or 0) or None)


def quantised_part(name: str) -> str | None:
    """The part of `PARTS` that a tensor belongs to by its official name."""
    return next((part for part, pattern in PARTS if pattern.search(name)), None)
