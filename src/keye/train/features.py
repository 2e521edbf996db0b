"""Visual tokens of media that are computed once and stored on disk, while the part that computes them is not trained.

Where vision tower and projector are frozen, visual tokens are stored; where the projector is trained, what the tower
makes of the patches. An entry belongs to one medium under its plan, to the weights, and to their dtype.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye.cache.fingerprint import weights_hash
from keye.errors import KeyeError
from keye.files import complete_file
from keye.models.keye import KeyeModel
from keye.models.quant_fill import plain_state, quantized_weights
from keye.models.vision import encode_tower, project_features
from keye.train.parallel import join_tensor
from keye.train.tree import Packed
from keye.version import __version__

#: What is stored of a medium: visual tokens, or the features of its patches before the projector.
Stored = Literal["tokens", "patches"]
_NAME: Final = "features"
_SUFFIX: Final = ".safetensors"


def choose_stored(trained: Iterable[str]) -> Stored | None:
    """What can be stored while the parameters of these names are trained; None where the tower is among them."""
    names = list(trained)
    if any("visual." in name for name in names):
        return None
    return "patches" if any("mlp_AR." in name for name in names) else "tokens"


@dataclass
class FeatureCache:
    """Features in the files of a folder, of at most `limit` bytes: what was not used for longest goes first. Processes
    may share the folder. `digest` names what computes them (`digest_of`)."""

    folder: Path
    digest: str
    stored: Stored
    limit: int
    _bytes: int = field(default=-1, repr=False)

    def read(self, key: bytes) -> NDArray | None:
        """Features [n, width] of a medium, bfloat16 as the int16 of its bits; None where there are none."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor(_NAME)
            os.utime(path)
        except (OSError, SafetensorError):  # missing, removed meanwhile, or damaged: computed again
            return None
        bits: NDArray = (features.view(torch.int16) if features.dtype == torch.bfloat16 else features).numpy()
        return bits

    def write(self, key: bytes, features: Tensor) -> None:
        """Keeps features [n, width]. Nothing is stored of a medium that is larger than the limit."""
        size = features.numel() * features.element_size()
        if size > self.limit:
            return
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as draft:
                save_file({_NAME: features.detach().cpu().contiguous()}, draft)
            if self._bytes < 0 or self._bytes + size > self.limit:
                self._bytes = self._make_room()
            else:
                self._bytes += size
        except OSError as error:
            raise KeyeError(f"{self.folder} cannot keep visual features ({error}): free room, name another folder, or "
                            "train without them") from None  # fmt: skip

    def _make_room(self) -> int:
        """Removes what was not used for longest, a tenth more than needed; returns the bytes that are left."""
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(_SUFFIX):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # another process removed it
                    continue
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total > self.limit:
            for _, size, path in sorted(files)[:-1]:
                Path(path).unlink(missing_ok=True)
                total -= size
                if total <= 0.9 * self.limit:
                    break
        return total

    def _path(self, key: bytes) -> Path:
        name = hashlib.sha256(b"\0".join((key, self.digest.encode(), self.stored.encode()))).hexdigest()
        return self.folder / (name[:40] + _SUFFIX)


def digest_of(model: KeyeModel, stored: Stored) -> str:
    """Names what computes features: weights of the vision tower, for visual tokens those of the projector as well,
    their dtypes, and the version of keye."""
    parts = ("visual.", "mlp_AR.") if stored == "tokens" else ("visual.",)
    plain = {name: join_tensor(tensor) for name, tensor in plain_state(model).items() if name.startswith(parts)}
    coded = {name: each.digest for name, each in quantized_weights(model).items() if name.startswith(parts)}
    default = model.adapter_rows.default
    facts = (__version__, model.config.vision, "" if default is None else default.fingerprint)
    return hashlib.sha256(f"{weights_hash(plain, coded)} {facts}".encode()).hexdigest()


def open_features(
    model: KeyeModel, trained: Iterable[str], folder: Path, *, limit: int = 64 << 30
) -> FeatureCache | None:
    """The features that can be stored while the parameters of these names are trained, None where there are none."""
    stored = choose_stored(trained) if model.config.has_vision else None
    return None if stored is None else FeatureCache(folder, digest_of(model, stored), stored, limit)


def encode_media(model: KeyeModel, packed: Packed[Tensor], cache: FeatureCache | None = None) -> Tensor | None:
    """The visual tokens [V, d] of a pack that is on the model's device, in the order of their places; None where it has
    no media. What is computed goes into `cache`, without gradients; the projector has them where patches are stored."""
    if not packed.media:
        return None
    if cache is None:
        assert packed.pixels is not None, "features are read by the cache that they were loaded from"
        return model.encode_vision(packed.pixels, packed.grids)
    rows = packed.grids.split([medium.rows for medium in packed.media])
    counts = [int(grid.prod(1).sum()) if cache.stored == "patches" else medium.tokens
              for grid, medium in zip(rows, packed.media, strict=True)]  # fmt: skip
    parts = dict[int, Tensor]()
    for is_cached, computed in ((True, packed.features), (False, _compute(model, packed, rows, cache.stored))):
        places = [place for place, medium in enumerate(packed.media) if medium.cached == is_cached]
        if computed is not None:
            parts |= dict(zip(places, computed.split([counts[place] for place in places]), strict=True))
            for place in () if is_cached else places:
                cache.write(packed.media[place].key, parts[place])
    features = torch.cat([_as_numbers(parts[place]) for place in range(len(parts))])
    if cache.stored == "tokens":
        return features
    return project_features(model.config.vision, model.mlp_AR, features, packed.grids)


@torch.no_grad()
def _compute(model: KeyeModel, packed: Packed[Tensor], rows: Sequence[Tensor], stored: Stored) -> Tensor | None:
    """The features of the media that come as pixels."""
    if packed.pixels is None:
        return None
    grids = torch.cat([grid for grid, medium in zip(rows, packed.media, strict=True) if not medium.cached])
    if stored == "tokens":
        return model.encode_vision(packed.pixels, grids)
    return encode_tower(model.visual, packed.pixels, grids)


def _as_numbers(features: Tensor) -> Tensor:
    return features.view(torch.bfloat16) if features.dtype == torch.int16 else features
