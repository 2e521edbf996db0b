"""New weights for parts of a model that keeps the others: a projector between a tower and a language model that have
not met, or the indexers of a model that attends densely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keye.config import ConfigError, KeyeConfig
from keye.models.attention import Indexer
from keye.models.keye import DecoderLayer, KeyeModel
from keye.train.parts import is_in_part

#: Size of the gates of a new indexer: its scores then hardly differ, and every key has a chance to be selected.
GATE_SCALE = 0.1


@torch.no_grad()
def renew_parts(model: KeyeModel, config: KeyeConfig, parts: Sequence[str], seed: int) -> None:
    """Gives `parts` (see `keye.train.config.PARTS`) new weights, the same for the same seed: matrices have the
    deviation 1 / sqrt(inputs), norms are the identity, biases zero. Indexers are added where `config` describes them
    and the model has none. `ConfigError` for a part that the model does not have."""
    if "indexer" in parts:
        _add_indexers(model, config)
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        names = [name for name, _ in model.named_parameters() if is_in_part(name, part)]
        if not names:
            raise ConfigError(f'renews names "{part}", which the model does not have; leave it out')
        for name in names:
            _renew(model.get_parameter(name), name, generator)
    if "indexer" in parts:
        _set_gates(model)


def _add_indexers(model: KeyeModel, config: KeyeConfig) -> None:
    if config.text.sparse is None:
        raise ConfigError('renews names "indexer", but config.json has no sa_config; add it')
    if model.config.text.sparse is not None:
        return
    for layer in model.model.layers:
        layer.get_submodule("self_attn").sa_indexer = Indexer(config.text).to(device=model.device, dtype=model.dtype)
    model.config, model.model.config = config, config.text


def _renew(parameter: nn.Parameter, name: str, generator: torch.Generator) -> None:
    if parameter.ndim < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    inputs = parameter.shape[-2] if ".experts." in name else parameter[0].numel()
    numbers: Tensor = torch.randn(parameter.shape, generator=generator) / inputs**0.5
    parameter.copy_(numbers)


def _set_gates(model: KeyeModel) -> None:
    """Queries and keys are normalised, so that the gates alone set the size of the scores: the same in every layer,
    however large its inputs are."""
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        indexer = layer.self_attn.get_submodule("sa_indexer")
        assert isinstance(indexer, Indexer)
        size = layer.input_layernorm.weight.float().square().mean().sqrt()
        indexer.q_proj.weight[indexer.heads * indexer.dim :] *= GATE_SCALE / size
