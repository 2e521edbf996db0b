"""Which of the published models this machine can run: their own configurations against its memory. Reads no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

from huggingface_hub import try_to_load_from_cache

from keye.config import load_model_config
from keye.hub import PACKAGED, PUBLISHED, asset
from keye.models.load import torch_dtype
from keye.planning.estimate import CostQuery, memory_of
from keye.process import memories
from keye.releases import RELEASES

#: The question that must fit: about so many frames of so many patches, with a short reply.
_FRAMES: Final = 64
_GRID: Final = (32, 32)
_REPLY: Final = 128


@dataclass(frozen=True)
class KnownModel:
    """A published model: `bytes` for a question about 64 frames, whether they `fits` the memory of this machine, and
    whether the files are `here` already."""

    name: str
    hub_name: str
    bytes: int
    fits: bool
    here: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@cache
def list_known_models() -> tuple[KnownModel, ...]:
    """The published models, for the largest memory of this machine. Found out once."""
    largest = max((memory.total for memory in memories()), default=0)
    known = []
    for release in RELEASES.values():
        short, hub_name = release.name.lower(), release.hub_name
        if hub_name is None or short in PACKAGED or short not in PUBLISHED:
            continue
        size = _memory_of(short)
        here = isinstance(try_to_load_from_cache(hub_name, "config.json"), str)
        known.append(KnownModel(short, hub_name, size, size <= largest, here))
    return tuple(known)


def _memory_of(short: str) -> int:
    config = load_model_config(asset(f"configs/{short}"))
    tokens = _FRAMES * _GRID[0] * _GRID[1] // config.vision.spatial_merge_size**2
    query = CostQuery(_FRAMES, _GRID, tokens + _FRAMES, _REPLY)
    return sum(memory_of(config, query, torch_dtype(config.dtype), "auto").values())
