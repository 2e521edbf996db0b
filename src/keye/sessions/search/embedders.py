"""Image-text embeddings of other packages, by which a search may rank frames. None is needed.

A package offers one as an entry point of the group `keye.embedders`: a callable without arguments that returns an
`Embedder`. A user names it; nothing is loaded that was not named.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from keye.errors import KeyeError

GROUP: Final = "keye.embedders"
#: Dimensions of an embedding at most: stored vectors take 2 bytes each.
MAX_DIM: Final = 8192


@runtime_checkable
class Embedder(Protocol):
    """Maps pictures and text into one space, in which the cosine tells how well they match. Vectors need not have unit
    length."""

    name: str
    """Stored beside the vectors: it must change whenever the space does."""
    dim: int

    def embed_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        """Vectors [N, dim] of RGB frames uint8 [N, H, W, 3]."""
        ...

    def embed_text(self, text: str) -> NDArray[np.floating[Any]]:
        """The vector [dim] of a text."""
        ...


def load_embedder(name: str) -> Embedder:
    """The embedder that an installed package offers under `name`. `KeyeError` where there is none, or it is not one."""
    offers = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offers:
        known = ", ".join(sorted(offers)) or "none is installed"
        raise KeyeError(f"embedder is {name!r}, which no installed package offers; known: {known}")
    try:
        embedder = offers[name].load()()
    except Exception as error:  # of the package
        raise KeyeError(f"the embedder {name} cannot be loaded ({error}): see its package") from error
    return check_embedder(embedder, name)


def check_embedder(embedder: object, name: str = "embedder") -> Embedder:
    """`KeyeError` where an object does not have what an embedder needs."""
    if not isinstance(embedder, Embedder):
        raise KeyeError(f"{name} is not an embedder: it needs name, dim, embed_frames and embed_text")
    if not isinstance(embedder.dim, int) or not 0 < embedder.dim <= MAX_DIM:
        raise KeyeError(f"{name} has the dimension {embedder.dim!r}; at most {MAX_DIM} are possible")
    return embedder


def unit_vectors(vectors: Any, count: int, embedder: Embedder) -> NDArray[np.float32]:
    """What an embedder returned as float32 [count, dim] of unit length (zero vectors stay zero); `KeyeError` for other
    shapes and numbers that are not finite."""
    array = np.asarray(vectors, dtype=np.float32)
    if array.shape not in ((count, embedder.dim), (embedder.dim,)[: count == 1]) or not np.isfinite(array).all():
        raise KeyeError(f"the embedder {embedder.name} returned {array.shape}, not {count} finite vectors of "
                        f"{embedder.dim} numbers")  # fmt: skip
    array = array.reshape(count, embedder.dim)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    return (array / np.where(norms > 0, norms, 1)).astype(np.float32)
