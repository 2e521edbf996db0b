"""Float8 weights with a scale for each block: read exactly, kept as they are where layers can, quantised again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keye.config import load_model_config
from keye.models.keye import KeyeModel
from keye.models.load import load_model, load_tensors, load_vision
from keye.quant.layers import QuantExperts, QuantLinear
from keye.weights.float8 import Float8Tensor
from keye.weights.open import open_weights
from keye.weights.source import TensorSource, WeightsError, copy_all
from tests.support.latent import BLOCK, latent_folder, latent_model, to_float8


def spread(codes: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """The numbers by the definition: each code times the scale of its block."""
    factors = torch.kron(scales, torch.ones(*[1] * (scales.dim() - 2), *block))
    return codes.float() * factors[..., : codes.shape[-2], : codes.shape[-1]]


def write(folder: Path, tensors: dict[str, Tensor], block: tuple[int, int] = BLOCK) -> None:
    section = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_file(tensors, folder / "model.safetensors")


def read(source: TensorSource, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(source.shape, torch.nan, dtype=dtype)
    copy_all(source.pieces(out))
    return out


@pytest.mark.parametrize("shape", [(40, 50), (16, 16), (1, 3), (33, 16)])
@pytest.mark.parametrize("piece", [1, 3000, 1 << 24])
def test_partial_blocks_are_read(
    shape: tuple[int, int], piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keye.weights.float8.PIECE_BYTES", piece)
    codes, scales = to_float8(torch.randn(shape, generator=torch.Generator().manual_seed(0)), BLOCK)
    write(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales, "y": torch.ones(2)})
    tensors = open_weights(tmp_path)
    assert set(tensors) == {"x.weight", "y"}
    source, want = tensors["x.weight"], spread(codes, scales)
    assert torch.equal(read(source), want)
    assert torch.equal(read(source, torch.bfloat16), want.bfloat16())
    transposed = torch.empty(shape[::-1])
    copy_all(source.pieces(transposed.t()))
    assert torch.equal(transposed.t(), want)
    assert torch.equal(source.quantized().dequantize(), want)
    begin, end = shape[0] // 3, shape[0] - shape[0] // 4
    part = source.part(begin, end)
    assert torch.equal(read(part), want[begin:end]), "rows need not begin with a block"
    assert (part.format is None) == (begin % BLOCK[0] != 0)


def test_stacks_of_matrices(tmp_path: Path) -> None:
    codes, scales = zip(*(to_float8(torch.randn(20, 24), BLOCK) for _ in range(3)), strict=True)
    name = "experts.gate_up_proj"
    write(tmp_path, {name: torch.stack(codes), f"{name}_scale_inv": torch.stack(scales)})
    source = open_weights(tmp_path)[name]
    assert torch.equal(read(source), spread(torch.stack(codes), torch.stack(scales)))
    assert torch.equal(read(source.part(1, 3)), spread(torch.stack(codes[1:]), torch.stack(scales[1:])))


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    codes, scales = to_float8(torch.randn(40, 50), BLOCK)
    write(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales[:2]})
    with pytest.raises(WeightsError, match=r"x\.weight_scale_inv is \[2, 4\], which does not fit x\.weight \[40, 50\]"):
        open_weights(tmp_path)
    scales[1, 1] = torch.nan
    write(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales})
    with pytest.raises(WeightsError, match=r"x\.weight_scale_inv holds NaN or infinite numbers"):
        read(open_weights(tmp_path)["x.weight"])
    write(tmp_path, {"x.weight": codes})
    assert not open_weights(tmp_path)["x.weight"].is_readable, "without scales codes are no numbers"


# A whole checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_folder(tmp_path_factory.mktemp("float8") / "model", float8=True)


def logits(model: KeyeModel) -> Tensor:
    from keye.cache.sequence import KVCache
    from keye.models.attention import CachedStep, Span

    ids = torch.arange(20)
    with torch.no_grad():
        step = CachedStep([Span(0, 20, KVCache(3))], model.config.text)
        return model.logits(model(model.embed(ids), ids.expand(3, -1), step))


def test_layers_keep_float8_and_give_the_numbers_of_the_file(folder: Path) -> None:
    config = load_model_config(folder)
    model, report = load_model(folder, config, dtype=torch.float32)
    layer = model.model.layers[1]
    assert isinstance(layer.self_attn.o_proj, QuantLinear) and isinstance(layer.mlp.experts, QuantExperts)
    assert layer.self_attn.o_proj.weight.format.kind == "fp8"
    assert {name.split(".")[2] for name in report.ignored} == {"3"} and not report.unused, "the draft layer"
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    numbers = {
        name: spread(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor.float()
        for name, tensor in tensors.items() if not name.endswith("_scale_inv")
    }  # fmt: skip
    want = latent_model(seed=1)
    load_tensors(want, numbers)
    torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=1e-4)


def test_float8_can_be_quantised_again(folder: Path) -> None:
    config = load_model_config(folder)
    eight, _ = load_model(folder, config, dtype=torch.float32, quant="int8")
    plain, _ = load_model(folder, config, dtype=torch.float32)
    assert eight.model.layers[1].self_attn.o_proj.weight.format.kind == "int8"
    off = (logits(eight) - logits(plain)).norm(dim=1) / logits(plain).norm(dim=1)
    assert off.median() < 0.1


def test_vision_of_a_float8_checkpoint_loads_alone(folder: Path) -> None:
    tower, report = load_vision(folder)
    assert sum(parameter.numel() for parameter in tower.parameters()) > 0 and not report.unused


def test_experts_whose_blocks_cross_from_gate_to_up_are_read_as_numbers(tmp_path: Path) -> None:
    folder = latent_folder(tmp_path / "model", float8=True, moe_intermediate_size=24)
    model, _ = load_model(folder, load_model_config(folder), dtype=torch.float32)
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float32
    assert isinstance(open_weights(folder)["model.layers.1.mlp.experts.0.up_proj.weight"], Float8Tensor)
    assert torch.isfinite(logits(model)).all()
