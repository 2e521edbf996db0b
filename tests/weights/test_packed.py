"""Checkpoints of other quantisers: compressed-tensors, AutoFP8, MLX. Numbers are those of the formats' definitions, bit
for bit, and stay in the same bits in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import keye
from keye import KeyeError
from keye.config import load_model_config
from keye.models.load import load_model
from keye.quant.layers import QuantEmbedding, QuantExperts, QuantLinear
from keye.weights.mlx import official_name
from keye.weights.open import open_weights
from keye.weights.safetensors import open_checkpoint
from keye.weights.source import TensorSource, WeightsError, copy_all
from tests.support.tiny import tiny_folder

Tensors = dict[str, Tensor]
GENERATOR = torch.Generator()


def write(folder: Path, tensors: Tensors, **config: Any) -> dict[str, TensorSource]:
    """A folder with these tensors, opened."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return dict(open_weights(folder))


def read(source: TensorSource, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(source.shape, torch.nan, dtype=dtype)
    copy_all(source.pieces(out))
    return out


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=GENERATOR.manual_seed(sum(shape)))


def factors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(shape, generator=GENERATOR.manual_seed(5)) * 0.1 + 1e-3).to(dtype)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned values [M, N] -> int32 [M, ceil(N * bits / 32)], the first in the lowest bits."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % each)).unflatten(1, (-1, each))
    words = sum(padded[..., place] << (bits * place) for place in range(each))
    return words.to(torch.uint32).view(torch.int32)


def group_spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """A scale [M, G] beside each of the numbers of its group."""
    return scales.repeat_interleave(group, 1)[:, :columns]


def section(form: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }}  # fmt: skip


def check(source: TensorSource, expected: Tensor) -> None:
    """The numbers, those of any rows, and the same bits in memory."""
    assert source.shape == tuple(expected.shape)
    assert torch.equal(read(source), expected)
    assert torch.equal(read(source, torch.bfloat16), expected.bfloat16())
    begin, end = expected.shape[0] // 3, expected.shape[0] - 1
    assert torch.equal(read(source.part(begin, end)), expected[begin:end])
    assert source.format is not None
    assert torch.equal(source.quantized().dequantize(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 64, 32), (9, 40, None), (16, 44, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_packed_integers(
    bits: int, symmetric: bool, rows: int, columns: int, group: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    half = 1 << (bits - 1)
    codes, groups = integers(-half, half - 1, rows, columns), -(-columns // (group or columns))
    scales, zeros = factors(rows, groups, dtype=dtype), integers(-half, half - 1, rows, groups)
    tensors = {
        "x.weight_packed": pack_words(codes + half, bits), "x.weight_scale": scales,
        "x.weight_shape": torch.tensor([rows, columns]), "x.bias": torch.ones(rows),
        "y.weight": torch.ones(3, 4), "x.input_global_scale": torch.ones(1), "self_attn.k_scale": torch.ones(1),
    }  # fmt: skip
    if not symmetric:
        tensors["x.weight_zero_point"] = pack_words((zeros + half).t(), bits).t()
    config = section("pack-quantized", num_bits=bits, symmetric=symmetric, group_size=group)
    sources = write(tmp_path, tensors, **config)
    assert set(sources) == {"x.weight", "x.bias", "y.weight"}
    shifted = codes if symmetric else codes - group_spread(zeros, group or columns, columns)
    check(sources["x.weight"], shifted.float() * group_spread(scales, group or columns, columns).float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(12, 1), (12, 4), (1,), (12,)], ids=str)
def test_integers_of_a_byte(symmetric: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    codes, scales, zeros = integers(-128, 127, 12, 32), factors(*shape), integers(-128, 127, *shape)
    tensors = {"x.weight": codes.to(torch.int8), "x.weight_scale": scales}
    if not symmetric:
        tensors["x.weight_zero_point"] = zeros.to(torch.int8)
    sources = write(tmp_path, tensors, **section("int-quantized", num_bits=8, symmetric=symmetric))
    wide = scales.float().view(-1, shape[1] if len(shape) > 1 else 1)
    zeros = zeros.view(wide.shape) if not symmetric else torch.zeros(wide.shape, dtype=torch.int64)
    spread, offset = (group_spread(t.expand(12, -1), 32 // wide.shape[1], 32) for t in (wide, zeros))
    check(sources["x.weight"], (codes - offset).float() * spread)


@pytest.mark.parametrize("kind", ["tensor", "scalar", "channel", "block", "autofp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_float8(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.randn(20, 36, generator=GENERATOR.manual_seed(1)).to(torch.float8_e4m3fn)
    shapes = {"tensor": (1,), "scalar": (), "autofp8": (), "channel": (20, 1), "block": (3, 5)}
    scales = factors(*shapes[kind], dtype=dtype)
    config = section("float-quantized", num_bits=8, type="float", block_structure=[8, 8] if kind == "block" else None)
    if kind == "autofp8":
        config = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}}
    tensors = {"x.weight": codes, "x.weight_scale": scales, "x.input_scale": torch.ones(1)}
    sources = write(tmp_path, tensors, **config)
    assert set(sources) == {"x.weight"}
    blocks = torch.kron(scales.float(), torch.ones(8, 8))[:20, :36] if kind == "block" else scales.float()
    check(sources["x.weight"], codes.float() * blocks)


def affine(values: Tensor, bits: int, scales: Tensor, biases: Tensor, name: str = "x") -> Tensors:
    words = pack_words(values, bits).view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": biases}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_affine_codes_of_mlx(bits: int, group: int, dtype: torch.dtype, tmp_path: Path) -> None:
    values, scales = integers(0, (1 << bits) - 1, 10, 128), factors(10, 128 // group, dtype=dtype)
    biases = (-scales.float() * (1 << (bits - 1)) + 0.01).to(dtype)
    tensors = affine(values, bits, scales, biases, "language_model.model.x")
    tensors["visual.projector.linear_1.bias"] = biases[:, 0]
    sizes = {"group_size": group, "bits": bits}
    sources = write(tmp_path, tensors, quantization=sizes, quantization_config=sizes)
    assert set(sources) == {"model.x.weight", "mlp_AR.linear_1.bias"}
    expected = values.float() * group_spread(scales, group, 128).float() + group_spread(biases, group, 128).float()
    check(sources["model.x.weight"], expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("vision_tower.layers.2.mlp.fc1.bias", "visual.vision_model.encoder.layers.2.mlp.fc1.bias"),
        ("vision_model.encoder.layers.2.mlp.fc1.bias", "visual.vision_model.encoder.layers.2.mlp.fc1.bias"),
        ("visual.post_layernorm.weight", "visual.vision_model.post_layernorm.weight"),
        ("visual.vision_model.embeddings.position_embedding.weight",
         "visual.vision_model.embeddings.position_embedding.weight"),
        ("multi_modal_projector.linear_2.weight", "mlp_AR.linear_2.weight"),
        ("mlp_AR.pre_norm.weight", "mlp_AR.pre_norm.weight"),
    ],
)  # fmt: skip
def test_names_of_mlx(theirs: str, ours: str) -> None:
    assert official_name(theirs) == ours


# ---------------------------------------------------------------------------------------------------- whole models


def plain(folder: Path) -> Tensors:
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}


def rewrite(folder: Path, tensors: Tensors, **config: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def quantise_affine(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and biases by the range of each group, as MLX has them."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-6).bfloat16()
    biases = low.bfloat16()
    values = ((grouped - biases.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round()
    return values.clamp(0, (1 << bits) - 1).long().flatten(1), scales, biases


def mlx_name(name: str) -> str:
    """A name as mlx-vlm has it for towers of this kind."""
    name = name.replace("visual.vision_model.encoder.", "visual.").replace("visual.vision_model.", "visual.")
    name = name.replace("mlp_AR.", "visual.projector.")
    return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name


def to_mlx(tensors: Tensors, bits: int = 4, group: int = 32) -> tuple[Tensors, Tensors]:
    """The tensors of a checkpoint of MLX, and the numbers that it stands for under official names. Projections of the
    vision tower are joined, its convolution has channels last; what is not a matrix of whole groups stays."""
    renamed, encoded, meant = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if not (name.startswith("visual") and layer.endswith(("q_proj", "k_proj", "v_proj"))):
            renamed[name] = tensor
        elif layer.endswith("q_proj"):
            parts = [tensors[f"{layer.removesuffix('q_proj')}{own}_proj.{leaf}"] for own in "qkv"]
            renamed[f"{layer.removesuffix('q_proj')}qkv.{leaf}"] = torch.cat(parts)
    for name, tensor in renamed.items():
        layer, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and tensor.dim() == 2 and tensor.shape[1] % group == 0 and "mlp.gate" not in name
        if is_matrix:
            values, scales, biases = quantise_affine(tensor, bits, group)
            encoded |= affine(values, bits, scales, biases, mlx_name(layer))
            tensor = values.float() * group_spread(scales, group, tensor.shape[1]).float()
            tensor += group_spread(biases, group, tensor.shape[1]).float()
        else:
            encoded[mlx_name(name)] = tensor.permute(0, 2, 3, 1) if "patch_embedding.weight" in name else tensor
        if ".qkv." in name:
            meant |= {
                name.replace("qkv", f"{own}_proj"): part for own, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            meant[name] = tensor
    return encoded, meant


def test_a_model_of_mlx_is_loaded_in_its_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "mlx")
    encoded, meant = to_mlx(plain(folder))
    rewrite(folder, encoded, quantization={"group_size": 32, "bits": 4})
    model, report = load_model(folder, load_model_config(folder), dtype=torch.float32)
    assert report.unused == ()
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLinear)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    exact, _ = load_model(folder, load_model_config(folder), dtype=torch.float32, quant="none")
    state = exact.state_dict()
    for name, tensor in meant.items():
        assert torch.equal(state[name], tensor.float()), name
    answer = keye.load(folder).chat([{"role": "user", "content": "hello"}], max_tokens=2, ignore_eos=True)
    assert answer.usage.completion_tokens == 2


def test_a_model_of_compressed_tensors_is_loaded(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "int4")
    tensors, encoded, meant = plain(folder), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not layer.endswith("_proj") or "visual" in name:
            encoded[name] = meant[name] = tensor
            continue
        grouped = tensor.float().unflatten(1, (-1, 32))
        scales = (grouped.abs().amax(-1) / 7).clamp_min(1e-6).bfloat16()
        codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1).long()
        encoded |= {f"{layer}.weight_packed": pack_words(codes + 8, 4), f"{layer}.weight_scale": scales,
                    f"{layer}.weight_shape": torch.tensor(tensor.shape)}  # fmt: skip
        meant[name] = codes.float() * group_spread(scales, 32, tensor.shape[1]).float()
    rewrite(folder, encoded, **section("pack-quantized", strategy="group", group_size=32))
    model = keye.load(folder)
    assert isinstance(model.model.model.layers[0].self_attn.q_proj, QuantLinear)
    exact, _ = load_model(folder, load_model_config(folder), dtype=torch.float32, quant="none")
    assert all(torch.equal(exact.state_dict()[name], tensor.float()) for name, tensor in meant.items())


def test_experts_that_are_packed_one_by_one(tmp_path: Path) -> None:
    """As llm-compressor writes them: float8 with a scale of each matrix. A note says what is faster on a processor."""
    folder = tiny_folder(tmp_path / "fp8")
    tensors, meant = plain(folder), dict[str, Tensor]()
    for name in [name for name in tensors if ".experts." in name]:
        fused, base = tensors.pop(name).float(), name.rpartition(".")[0]
        owns = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        meant[name] = torch.zeros_like(fused)
        for e, matrix in enumerate(fused):
            for own, part, out in zip(
                owns, matrix.chunk(len(owns), 1), meant[name][e].chunk(len(owns), 1), strict=True
            ):
                scale = (part.abs().amax() / 448).bfloat16().view(1)
                codes = (part.t() / scale.float()).to(torch.float8_e4m3fn)
                tensors |= {f"{base}.{e}.{own}.weight": codes, f"{base}.{e}.{own}.weight_scale": scale}
                out.copy_((codes.float() * scale.float()).t())
    rewrite(folder, tensors, **section("float-quantized", num_bits=8, type="float", strategy="tensor"))
    loaded = keye.load(folder)
    assert isinstance(loaded.model.model.layers[0].mlp.experts, QuantExperts)
    assert any("weights are float8" in note for note in loaded.notes)
    exact, _ = load_model(folder, load_model_config(folder), dtype=torch.float32, quant="none")
    assert all(torch.equal(exact.state_dict()[name], tensor) for name, tensor in meant.items())
    answer = loaded.chat([{"role": "user", "content": "hello"}], max_tokens=2, ignore_eos=True)
    assert answer.usage.completion_tokens == 2


# ----------------------------------------------------------------------------------------------------- bad input

PACKED = {"x.weight_packed": torch.zeros(4, 4, dtype=torch.int32), "x.weight_shape": torch.tensor([4, 32]),
          "x.weight_scale": torch.ones(4, 1, dtype=torch.bfloat16)}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x.weight_shape": None}, "without a weight_shape"),
        ({"x.weight_shape": torch.tensor([4, 1 << 40])}, "not 4 x 1099511627776 numbers of 4 bits"),
        ({"x.weight_shape": torch.tensor([-4, 32])}, "not -4 x 32 numbers"),
        ({"x.weight_scale": None}, "no weight_scale"),
        ({"x.weight_scale": torch.ones(3, 1)}, "does not fit"),
        ({"x.weight_scale": torch.ones(4, 1, dtype=torch.int32)}, "a weight_scale I32"),
        ({"x.weight_packed": torch.zeros(4, 4)}, "weight_packed is F32"),
        ({"x.weight_zero_point": torch.zeros(4, 1, dtype=torch.int32)}, "weight_zero_point is I32"),
        ({"x.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, "actorder group"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together(changes: dict[str, Tensor | None], sentence: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in {**PACKED, **changes}.items() if tensor is not None}
    with pytest.raises(WeightsError, match=sentence):
        write(tmp_path, tensors, **section("pack-quantized"))


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    tensors = {**PACKED, "x.weight_scale": torch.full((4, 1), torch.inf, dtype=torch.bfloat16)}
    with pytest.raises(WeightsError, match="NaN or infinite numbers"):
        read(write(tmp_path, tensors, **section("pack-quantized"))["x.weight"])


def test_float8_codes_that_are_not_numbers(tmp_path: Path) -> None:
    codes = torch.full((4, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"x.weight": codes, "x.weight_scale": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"x\.weight holds numbers that are not finite"):
        read(write(tmp_path, tensors, **section("float-quantized", num_bits=8, type="float"))["x.weight"])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (section("nvfp4-pack-quantized", type="float"), "nvfp4-pack-quantized.*int4, int8 and float8"),
        (section("pack-quantized", num_bits=3), "weights of 3 bits"),
        ({"quantization": {"bits": 3, "group_size": 64}}, "MLX with bits 3"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"a": 1}}},
         "transform_config"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    rewrite(folder, plain(folder), **config)
    with pytest.raises(KeyeError, match=sentence):
        keye.load(folder)


@pytest.mark.parametrize(
    ("leaf", "tool"),
    [("qweight", "GPTQ or AWQ"), ("qzeros", "GPTQ or AWQ"), ("weight.absmax", "bitsandbytes"), ("SCB", "bitsandbytes"),
     ("q_invperm", "EXL2"), ("trellis", "EXL3"), ("W_q", "HQQ or SINQ"), ("weight:_data", "torchao"),
     ("weight._scale", "quanto"), ("codebooks", "AQLM"), ("weight_scale_2", "ModelOpt"),
     ("weight_packed", "compressed-tensors")],
)  # fmt: skip
def test_other_quantisers_are_named_by_their_tensors(leaf: str, tool: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    tensors = plain(folder)
    tensors[f"model.layers.0.self_attn.q_proj.{leaf}"] = torch.ones(4)
    rewrite(folder, tensors)
    with pytest.raises(WeightsError, match=rf"was quantised by {tool}.*it holds model\.layers\.0\.self_attn\.q_proj\."):
        load_model(folder, load_model_config(folder))


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "exl2", "hqq", "torchao", "auto-round", "quanto", "sinq"]
)
def test_other_quantisers_are_named_by_their_section(method: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    rewrite(folder, plain(folder), quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(KeyeError, match=rf"\({method}\).*use the bfloat16 release of the model, and `keye quantize`"):
        keye.load(folder)
