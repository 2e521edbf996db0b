"""Every layout that Keye checkpoints come in: written under official names, read strictly, back bit for bit."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from keye.config import load_model_config, model_config_from_dict, read_json
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import LoadReport, load_model, load_vision, save_model
from keye.weights import safetensors as checkpoint
from keye.weights.safetensors import INDEX_FILE, WEIGHTS_FILE, open_checkpoint
from keye.weights.source import WeightsError, ask_for_huge_pages, copy_all
from tests.support.disk import largest_file

PREVIEW, V1_5, V2 = (
    "KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration", "KeyeVL2MoeForConditionalGeneration",
)  # fmt: skip

HEAD = {
    "probe": (1, 1, 32), "attention.in_proj_weight": (96, 32), "attention.in_proj_bias": (96,),
    "attention.out_proj.weight": (32, 32), "attention.out_proj.bias": (32,), "layernorm.weight": (32,),
    "layernorm.bias": (32,), "mlp.fc1.weight": (48, 32), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (32, 48),
    "mlp.fc2.bias": (32,),
}  # fmt: skip
#: What official files hold and no model reads, in the small geometry of these tests.
EXTRAS = {
    "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(64, 32),
    **{f"visual.vision_model.head.{name}": torch.zeros(shape) for name, shape in HEAD.items()},
}


def per_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused experts [E, in, out] as separate matrices [out, in], the way Qwen checkpoints name them."""
    out = {name: tensor for name, tensor in state.items() if ".mlp.experts." not in name}
    for name, fused in state.items():
        prefix, _, leaf = name.rpartition(".")
        for e, weight in enumerate(fused if ".mlp.experts." in name else ()):
            halves = {"gate_proj": weight.chunk(2, 1)[0], "up_proj": weight.chunk(2, 1)[1]}
            for part, matrix in ({"down_proj": weight} if leaf == "down_proj" else halves).items():
                out[f"{prefix}.{e}.{part}.weight"] = matrix.t().contiguous()
    return out


def without_indexer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if ".sa_indexer." not in name}


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint folder as the hub has it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / WEIGHTS_FILE)
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], int]] = {
    "preview": ({"architectures": [PREVIEW]}, unchanged, 1),
    "preview, sharded": ({"architectures": [PREVIEW]}, unchanged, 3),
    "1.5": ({"architectures": [V1_5]}, unchanged, 2),
    "2.0 fused": ({"architectures": [V2]}, unchanged, 2),
    "2.0 per expert": ({"architectures": [V2]}, per_expert, 3),
    "2.0 without indexer": ({"architectures": [V2], "sa_config": None}, unchanged, 1),
    "2.0 with dense layers": ({"architectures": [V2], "mlp_only_layers": [0]}, per_expert, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_strictly(layout: str, tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    overrides, rename, shards = LAYOUTS[layout]
    overrides = {**overrides, "torch_dtype": "float32"}
    model, raw = make_model(**overrides), {**raw_config, **overrides}
    write(tmp_path, raw, {**rename(dict(model.state_dict())), **EXTRAS}, shards)
    loaded, report = load_model(tmp_path, load_model_config(tmp_path))
    assert report == LoadReport(tuple(sorted(EXTRAS)))
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_releases_differ_where_the_spec_says(make_model: Any) -> None:
    shapes = {
        arch: {name: tuple(t.shape) for name, t in make_model(architectures=[arch]).state_dict().items()}
        for arch in (PREVIEW, V1_5, V2)
    }
    assert shapes[PREVIEW]["mlp_AR.pre_norm.weight"] == (32,)
    assert shapes[V1_5]["mlp_AR.pre_norm.weight"] == shapes[V2]["mlp_AR.pre_norm.weight"] == (128,)
    assert shapes[PREVIEW].keys() == shapes[V1_5].keys()
    assert "model.layers.0.mlp.gate_proj.weight" in shapes[V1_5]
    assert shapes[V2]["model.layers.0.mlp.experts.gate_up_proj"] == (8, 48, 48)
    assert shapes[V2]["model.layers.0.self_attn.sa_indexer.q_proj.weight"] == (8 * 16 + 8, 48)


def test_a_checkpoint_of_another_release_is_refused(tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    raw = {**raw_config, "architectures": [V1_5]}
    write(tmp_path, raw, dict(make_model(architectures=[PREVIEW]).state_dict()))
    message = r"mis-shaped: mlp_AR.pre_norm.bias is \[32\] instead of \[128\], mlp_AR.pre_norm.weight"
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path, load_model_config(tmp_path))


def test_without_indexer_weights_attention_is_dense(tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    write(tmp_path, raw_config, without_indexer(dict(make_model().state_dict())))
    loaded, report = load_model(tmp_path, load_model_config(tmp_path))
    assert report.lacks_indexer
    assert loaded.config.text.sparse is None
    assert not any("sa_indexer" in name for name in loaded.state_dict())


def test_half_an_indexer_is_an_error(tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    state = dict(make_model().state_dict())
    del state["model.layers.1.self_attn.sa_indexer.k_norm.bias"]
    write(tmp_path, raw_config, state)
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.1\.self_attn\.sa_indexer\.k_norm\.bias$"):
        load_model(tmp_path, load_model_config(tmp_path))


def test_unknown_tensors_are_an_error_or_a_report(tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    write(tmp_path, raw_config, {**make_model().state_dict(), "visual.deepstack.0.weight": torch.zeros(2)})
    config = load_model_config(tmp_path)
    with pytest.raises(WeightsError, match=r"unexpected: visual\.deepstack\.0\.weight$"):
        load_model(tmp_path, config)
    assert load_model(tmp_path, config, strict=False)[1].unused == ("visual.deepstack.0.weight",)


# 671B


@pytest.fixture
def large(tmp_path: Path, make_model: Any, raw_config: Any) -> Path:
    """A folder of Keye-VL-671B: the first shard holds vision and projector, the second was not fetched."""
    raw = {**raw_config, "architectures": ["KeyeVLMoeForConditionalGeneration"], "torch_dtype": "float32"}
    state = {n: t for n, t in make_model().state_dict().items() if n.startswith(("visual.", "mlp_AR."))}
    write(tmp_path, raw, state)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    weight_map["model.layers.0.self_attn.kv_b_proj.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_vision_of_671b_loads_alone(large: Path, make_model: Any) -> None:
    tower, report = load_vision(large)
    assert report == LoadReport(())
    pixels, grid = torch.randn(8, 3, 14, 14), torch.tensor([[2, 2, 2]])
    with torch.no_grad():
        assert torch.equal(tower(pixels, grid), make_model().encode_vision(pixels, grid))


def test_vision_needs_the_decoders_width(large: Path) -> None:
    raw = json.loads((large / "config.json").read_text())
    del raw["hidden_size"]
    (large / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match="hidden_size None; the projector needs"):
        load_vision(large)


# Saving


def test_shards_are_cut_at_the_limit(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    limit = 60_000
    assert save_model(model, tmp_path, shard_bytes=limit) == tmp_path / INDEX_FILE
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    usage = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        usage |= dict.fromkeys(tensors, shard)
    assert usage == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    loaded, _ = load_model(tmp_path, model.config, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saving_again_removes_what_an_earlier_save_left(tmp_path: Path, make_model: Any) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"not ours")
    for limit in (40_000, 80_000, checkpoint.SHARD_BYTES, 60_000):
        save_model(make_model(), tmp_path, shard_bytes=limit)
        files = {file.name for file in checkpoint.weight_files(tmp_path)}
        remaining = {file.name for file in tmp_path.glob("*.safetensors")} - {"notes.safetensors"}
        assert remaining == files
    assert (tmp_path / "notes.safetensors").exists()


def test_a_sharded_save_that_fails_changes_nothing(tmp_path: Path, make_model: Any) -> None:
    save_model(make_model(seed=1), tmp_path, shard_bytes=60_000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    largest = max(map(len, before.values()))
    assert sum(len(data) == largest for data in before.values()) < len(before) / 2  # others are written before it
    with largest_file(largest - 1), pytest.raises(OSError, match="too large"):
        save_model(make_model(seed=2), tmp_path, shard_bytes=60_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Reading bytes


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_any_float_becomes_any_other(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 64)  # several rounds, the last one short
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(stored)
    others = {"first": torch.ones(3), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    save_file({**others, "x": x}, tmp_path / WEIGHTS_FILE)
    tensors = open_checkpoint(tmp_path)
    for target in (torch.zeros(7, 11, dtype=wanted), torch.zeros(11, 7, dtype=wanted).t()):
        copy_all(tensors["x"].pieces(target))
        assert torch.equal(target, x.to(wanted))
    item = torch.zeros((), dtype=wanted)
    copy_all([*tensors["one"].pieces(item), *tensors["empty"].pieces(torch.zeros(0, 4))])
    assert item == 2.5


def test_headers_agree_with_safetensors(tmp_path: Path, make_model: Any) -> None:
    save_model(make_model(), tmp_path)
    tensors = open_checkpoint(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes


def test_bytes_that_keye_does_not_read(tmp_path: Path, make_model: Any, raw_config: Any) -> None:
    state = {**make_model().state_dict(), "lm_head.weight": torch.zeros(96, 48, dtype=torch.float8_e4m3fn)}
    write(tmp_path, raw_config, state)
    with pytest.raises(WeightsError, match=r"numbers that keye reads: lm_head\.weight is F8_E4M3$"):
        load_model(tmp_path, load_model_config(tmp_path))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(WeightsError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"x": 1}}])
def test_an_index_that_is_none(index: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="has no weight_map"):
        open_checkpoint(tmp_path)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / WEIGHTS_FILE)
    tensor = open_checkpoint(tmp_path)["x"]
    with open(tmp_path / WEIGHTS_FILE, "r+b") as file:
        file.truncate(tensor.start + 10)
    with pytest.raises(WeightsError, match=r"ends inside x; fetch it again"):
        copy_all(tensor.pieces(torch.zeros(100)))


def test_real_geometry_without_weights() -> None:
    """The published shapes, from the configurations alone (meta device)."""
    for name, shapes in {
        "preview": {"mlp_AR.pre_norm.weight": (1152,), "mlp_AR.linear_2.weight": (4096, 4608)},
        "1.5": {"mlp_AR.pre_norm.weight": (4608,), "model.layers.35.mlp.down_proj.weight": (4096, 12288)},
        "2.0": {
            "model.layers.47.mlp.experts.gate_up_proj": (128, 2048, 1536),
            "model.layers.47.mlp.experts.down_proj": (128, 768, 2048),
            "model.layers.0.self_attn.sa_indexer.q_proj.weight": (1040, 2048),
            "model.layers.0.self_attn.sa_indexer.k_proj.weight": (64, 2048),
            "visual.vision_model.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
            "visual.vision_model.embeddings.position_embedding.weight": (729, 1152),
        },
    }.items():
        config = model_config_from_dict(read_json(asset(f"configs/{name}") / "config.json"))
        with torch.device("meta"):
            state = KeyeModel(config).state_dict()
        assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has huge pages on request")
def test_only_large_tensors_in_main_memory_get_huge_pages():
    large = torch.empty(8 * 2**20, dtype=torch.uint8)
    assert ask_for_huge_pages(large)
    assert int(large.fill_(3).sum(dtype=torch.int64)) == 3 * 8 * 2**20
    assert not ask_for_huge_pages(torch.empty(100))
    assert not ask_for_huge_pages(torch.empty(8 * 2**20, device="meta"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_one_sentence(
    make_model: Any, raw_config: dict[str, Any], tmp_path: Path, value: float
) -> None:
    state = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    state["model.layers.1.self_attn.q_proj.weight"][3, 5] = value
    folder = write(tmp_path, raw_config, state)
    with pytest.raises(WeightsError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN or infinite numbers"):
        load_model(folder, load_model_config(folder))
