"""Cases on disk: `DIR/<set>/case-XX.json` with `case-XX.safetensors`. Finds, reads and compares; knows no network."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

#: Tolerances that the vectors' README states: float32 tensors and logits.
FLOAT_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 2e-4


class NotApplicable(Exception):
    """The case belongs to something that this version does not implement; the message says what."""


@dataclass(frozen=True)
class Case:
    """One pair of files. `set_name` is the folder's name."""

    path: Path

    @property
    def set_name(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return f"{self.set_name}/{self.path.stem.removeprefix('case-')}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The json file."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the safetensors file."""
        return load_file(self.path.with_suffix(".safetensors"))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors `w.*` without their prefix."""
        return {name[2:]: tensor for name, tensor in self.tensors.items() if name.startswith("w.")}

    @property
    def informative(self) -> set[str]:
        """Tensors that record a property of the official code that need not be reproduced, as `informative` lists them
        before its first colon; names may end with `.*`."""
        listed = str(self.meta.get("informative", "")).partition(":")[0]
        patterns = [name.strip() for name in listed.split("/")]
        return {name for name in self.tensors if any(fnmatchcase(name, pattern) for pattern in patterns)}

    @property
    def is_informative(self) -> bool:
        """Whether the whole case only records a property of the official code: it is marked, but names no tensors."""
        return bool(self.meta.get("informative")) and not self.informative

    def tolerance(self, default: float = FLOAT_TOLERANCE) -> float:
        """The first number of the case's own tolerance text."""
        result = re.search(r"\d+(?:\.\d+)?e-\d+", str(self.meta.get("tolerance", "")))
        return float(result[0]) if result else default


@dataclass
class Check:
    """Collects every difference of one case, so that a failure names all rows and tensors that are off."""

    problems: list[str] = field(default_factory=list)
    compared: int = 0

    def equal(self, name: str, got: Any, want: Any) -> None:
        """Integers, sizes, sets and strings."""
        self.compared += 1
        got, want = _plain(got), _plain(want)
        if got != want:
            self.problems.append(f"{name}: got {_short(got)}, want {_short(want)}")

    def close(self, name: str, got: Tensor, want: Tensor, tolerance: float, *, relative: bool = False) -> None:
        """Floats: |got - want| <= tolerance (+ tolerance * |want| if `relative`); infinities must agree."""
        self.compared += 1
        if got.shape != want.shape:
            self.problems.append(f"{name}: shape {list(got.shape)}, want {list(want.shape)}")
            return
        got, want = got.detach().double(), want.double()
        if not torch.allclose(got, want, rtol=tolerance if relative else 0.0, atol=tolerance):
            same_infinity = torch.isinf(want) & (got == want)
            worst = (got - want).masked_fill(same_infinity, 0.0).abs().max().item()
            self.problems.append(f"{name}: largest error {worst:.3g} is above {tolerance:g}")

    def fail(self, name: str, message: str) -> None:
        self.problems.append(f"{name}: {message}")

    def finish(self) -> None:
        """Raises `AssertionError` with every difference; a case that compared nothing is a failure too."""
        assert self.compared, "the case holds nothing that was compared"
        text = self.problems[:40] + ([f"... {len(self.problems) - 40} more"] if len(self.problems) > 40 else [])
        assert not self.problems, f"{len(self.problems)} of {self.compared} comparisons differ\n" + "\n".join(text)


def discover(folder: Path) -> list[Case]:
    """All cases of a folder, by set and name."""
    return [Case(path) for path in sorted(folder.glob("*/case-*.json"))]


def is_preview(meta: dict[str, Any]) -> bool:
    """Whether a case records Keye-VL-8B-Preview, by its generation, its class or the official files that made it."""
    if "generation" in meta:
        return str(meta["generation"]).startswith("Preview")
    return meta.get("model_class") == "preview" or "keye-vl-8b-preview" in str(meta.get("provenance"))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
