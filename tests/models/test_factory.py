"""A loader puts other layers in the place of Linear and Experts: on the meta device, or into a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keye.config import KeyeConfig
from keye.models.keye import KeyeModel
from keye.models.load import load_model, replace_layers, save_model
from keye.models.moe import Experts
from keye.weights.safetensors import WEIGHTS_FILE, open_checkpoint, write_checkpoint
from keye.weights.source import MemoryTensor, TensorSource, WeightsError, copy_all

Run = Callable[..., Tensor]


class Counting(nn.Module):
    """The plain layer inside a layer of its own, as an adapter has it; counts its calls."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.weight = plain.weight
        self.bias = plain.bias
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """Codes and a scale of each output, which files hold as floating-point numbers."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        with torch.no_grad():
            weight = plain.weight.float()
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            self.weight = nn.Parameter((weight / scale).round().to(plain.weight.dtype))
            self.scale = nn.Parameter(scale.to(plain.weight.dtype))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise(name: str, layer: nn.Module) -> nn.Module:
    """The projections of attention alone."""
    return Int8Linear(layer) if isinstance(layer, nn.Linear) and ".self_attn." in name else layer


@pytest.fixture
def model(make_model: Any) -> KeyeModel:
    return make_model()


@pytest.fixture
def run(make_prompt: Any, run_chunks: Any) -> Run:
    prompt = make_prompt(0, 20)
    return lambda model: run_chunks(model, prompt, [20])


def test_every_matrix_but_routers_is_offered_by_name(model: KeyeModel, small_config: KeyeConfig) -> None:
    offered: dict[str, nn.Module] = {}
    replace_layers(model, lambda name, layer: offered.setdefault(name, layer))
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    plain = {name for name in matrices if "_embedding" in name or name.endswith(".mlp.gate")}
    experts = {name for name, layer in model.named_modules() if isinstance(layer, Experts)}
    assert set(offered) == matrices - plain | experts and "lm_head" in offered


def test_a_tied_head_is_not_offered(make_model: Any) -> None:
    offered: list[str] = []
    replace_layers(make_model(tie_word_embeddings=True), lambda name, layer: offered.append(name) or layer)
    assert offered and "lm_head" not in offered


def test_layers_are_replaced_on_the_meta_device(
    model: KeyeModel, small_config: KeyeConfig, run: Run, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    result: dict[str, Counting] = {}

    def count(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Linear):
            return layer
        assert layer.weight.device.type == "meta", "no memory is taken for the layer that is replaced"
        return result.setdefault(name, Counting(layer))

    loaded, _ = load_model(tmp_path, small_config, dtype=torch.float32, layers=count)
    assert torch.equal(run(loaded), run(model))
    text = {name for name in result if not name.startswith(("visual.", "mlp_AR."))}
    assert text and all(result[name].calls == 1 for name in text)


def test_a_loaded_model_is_quantised_and_its_checkpoint_loaded(
    model: KeyeModel, small_config: KeyeConfig, run: Run, tmp_path: Path
) -> None:
    exact = run(model)
    replace_layers(model, quantise)
    quantised = run(model)
    assert 0 < (quantised - exact).norm() < 0.1 * exact.norm()
    write_checkpoint(model.state_dict(), tmp_path)
    loaded, _ = load_model(tmp_path, small_config, dtype=torch.float32, layers=quantise)
    assert torch.equal(run(loaded), quantised)
    with pytest.raises(WeightsError, match=r"unexpected: .*self_attn\.k_proj\.scale"):
        load_model(tmp_path, small_config, dtype=torch.float32)


def test_a_file_format_is_a_mapping_of_sources(tmp_path: Path) -> None:
    """What a loader needs of a tensor, whatever its format: here of safetensors and of memory."""
    x = torch.randn(3, 5)
    write_checkpoint({"x": x}, tmp_path)
    formats: tuple[Mapping[str, TensorSource], ...] = (open_checkpoint(tmp_path), {"x": MemoryTensor(x)})
    for tensors in formats:
        target = torch.zeros(3, 5, dtype=torch.bfloat16)
        copy_all(tensors["x"].pieces(target))
        assert tensors["x"].shape == (3, 5) and tensors["x"].is_readable and torch.equal(target, x.bfloat16())
    stored = formats[0]["x"]
    assert stored.dtype == "F32" and stored.place == (str(tmp_path / WEIGHTS_FILE), stored.place[1])
    with pytest.raises(AssertionError):
        copy_all(stored.pieces(torch.zeros(5, 3)))
