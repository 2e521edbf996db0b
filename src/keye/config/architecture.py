"""Architectures by the names in the official `config.json`, and the generation that each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from keye.config.files import ConfigError

Generation = Literal["preview", "1.5", "2.0"]


@dataclass(frozen=True)
class Architecture:
    """What an architecture name promises, beyond the numbers of its config.

    `sparse`: layers may have a DSA indexer. `moe`: layers may route to experts. `preview`: the vision tower attends
    over all frames of a video, the projector normalises before it merges, and the time axis of a video counts seconds.
    `runs`: whether its language model is implemented. `media_like`: the generation whose rules its media follow, where
    they are not its own.
    """

    generation: str
    sparse: bool = False
    moe: bool = False
    preview: bool = False
    runs: bool = True
    media_like: Generation | None = None

    @property
    def media(self) -> Generation:
        """The generation whose rules its media follow."""
        return self.media_like or cast(Generation, self.generation)


ARCHITECTURES = {
    "KeyeVL2MoeForConditionalGeneration": Architecture("2.0", sparse=True, moe=True),
    "KeyeVL2ForConditionalGeneration": Architecture("2.0", sparse=True),
    "KeyeVL1_5ForConditionalGeneration": Architecture("1.5"),
    "KeyeForConditionalGeneration": Architecture("preview", preview=True),
    "KeyeVLMoeForConditionalGeneration": Architecture("671B", moe=True, runs=False, media_like="1.5"),
}


def architecture_name(raw: Mapping[str, Any]) -> str:
    """The first known name in `architectures` of a parsed config.json; `ConfigError` when there is none."""
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    shown = ", ".join(map(str, names)) or "none"
    raise ConfigError(f"architecture {shown} is not supported; supported are {', '.join(ARCHITECTURES)}")
