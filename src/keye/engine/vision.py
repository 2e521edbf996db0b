"""Visual tokens of a prompt, encoded piece by piece, so that other requests decode in between (Chunk ViT)."""

from __future__ import annotations

import torch
from torch import Tensor

from keye.engine.prompt import Prompt
from keye.models.keye import KeyeModel


class VisionJob:
    """The visual tokens of one prompt, in order. `ready` of `total` are there; each call of `step` makes some more.

    The result does not depend on how the steps are cut: frames attend only to themselves.
    """

    def __init__(self, model: KeyeModel, prompt: Prompt) -> None:
        self._model = model
        self.total = prompt.media_tokens
        self.ready = 0
        self._parts: list[Tensor] = []
        self._inputs = [row for item in prompt.media for row in _rows(*item.vision.tensors())]

    @property
    def waiting(self) -> bool:
        """Whether the next patches are still being decoded."""
        return False

    @torch.inference_mode()
    def step(self, patches: int) -> int:
        """Encodes about `patches` patches, at least one frame; returns how many it encoded, 0 when all are done or the
        next are not decoded yet."""
        taken: list[tuple[Tensor, Tensor]] = []
        count = 0
        while self._inputs and (not taken or count + self._inputs[0][0].shape[0] <= patches):
            taken.append(self._inputs.pop(0))
            count += taken[-1][0].shape[0]
        if not taken:
            return 0
        device = self._model.device
        pixels, grids = (torch.cat(column).to(device) for column in zip(*taken, strict=True))
        self._parts.append(self._model.encode_vision(pixels, grids))
        self.ready += self._parts[-1].shape[0]
        return count

    def tokens(self, start: int, stop: int) -> Tensor:
        """Visual tokens start .. stop, [stop - start, d]; they must be ready."""
        assert stop <= self.ready
        return torch.cat(self._parts)[start:stop] if self._parts else torch.empty(0)

    def close(self) -> None:
        """Frees everything; may be called at any time, and twice."""
        self._inputs.clear()
        self._parts.clear()


def _rows(pixels: Tensor, grids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The patches of each grid row, with the row."""
    return list(zip(pixels.split(grids.prod(1).tolist()), grids.split(1), strict=True))
