"""Layers of a model replaced by others: quantised ones, shards, or ones that carry an adapter.

The networks make plain `nn.Linear` and `Experts`; a factory gets each of them with its full name, on the meta device
before a checkpoint is read or filled afterwards, and returns the layer to use in its place. So a factory sees shapes
and names, an adapter can keep the plain layer inside its own, and no network passes a factory on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from keye.models.moe import Experts, Router

#: (full name, the plain layer) -> the layer to use: the same one, or one with the same `forward`.
LayerFactory = Callable[[str, nn.Module], nn.Module]


def replace_layers(model: nn.Module, factory: LayerFactory) -> None:
    """Asks `factory` about every `nn.Linear` and `Experts` of a model. Routers, and a head that is tied to the
    embeddings, stay as they are."""
    tied = getattr(model, "is_tied", False)
    for name, layer in list(model.named_modules()):
        is_matrix = isinstance(layer, nn.Linear | Experts) and not isinstance(layer, Router)
        if is_matrix and not (tied and name == "lm_head"):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, factory(name, layer))
