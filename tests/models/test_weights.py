"""Checkpoints: what is written comes back bit for bit; what does not fit is named, all of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keye.errors import KeyeWarning
from keye.models.keye import KeyeModel
from keye.models.load import load_model, load_tensors, save_model
from keye.weights.safetensors import INDEX_FILE, WEIGHTS_FILE
from keye.weights.source import WeightsError


def assert_same(a: KeyeModel, b: KeyeModel) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under per-expert names, as Qwen-style checkpoints have them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            out[name] = tensor
            continue
        for e, weight in enumerate(tensor):
            if leaf == "down_proj":
                out[f"{prefix}.{e}.down_proj.weight"] = weight.t().contiguous()
            else:
                gate, up = weight.t().chunk(2)
                out[f"{prefix}.{e}.gate_proj.weight"] = gate.contiguous()
                out[f"{prefix}.{e}.up_proj.weight"] = up.contiguous()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_are_inverse(tmp_path: Path, make_model: Any, dtype: torch.dtype, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied).to(dtype)
    assert save_model(model, tmp_path) == tmp_path / WEIGHTS_FILE
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS_FILE], "no temporary file is left"
    loaded, report = load_model(tmp_path, model.config, dtype=dtype)
    assert_same(model, loaded)
    assert report.ignored == ()
    assert ("lm_head.weight" in load_file(tmp_path / WEIGHTS_FILE)) != tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training


def test_official_names(make_model: Any) -> None:
    names = set(make_model().state_dict())
    assert {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "mlp_AR.linear_1.weight",
        "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.weight",
        "model.layers.0.self_attn.sa_indexer.k_norm.bias", "model.layers.0.self_attn.q_norm.weight",
        "visual.vision_model.embeddings.position_embedding.weight", "mlp_AR.pre_norm.weight",
        "visual.vision_model.encoder.layers.1.self_attn.out_proj.bias",
    } <= names  # fmt: skip


def test_per_expert_names_equal_fused_ones(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    save_file(per_expert(dict(model.state_dict())), tmp_path / WEIGHTS_FILE)
    assert_same(model, load_model(tmp_path, model.config, dtype=torch.float32)[0])


def test_shards_of_an_index(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    state = sorted(model.state_dict().items())
    shards = {"model-00001-of-00002.safetensors": state[::2], "model-00002-of-00002.safetensors": state[1::2]}
    for file, part in shards.items():
        save_file(dict(part), tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name, _ in part}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert_same(model, load_model(tmp_path, model.config, dtype=torch.float32)[0])


def test_every_misfit_is_named_at_once(make_model: Any) -> None:
    model = make_model()
    tensors = dict(model.state_dict())
    del tensors["model.norm.weight"], tensors["mlp_AR.linear_2.bias"]
    tensors["model.embed_tokens.weight"] = torch.zeros(95, 48)
    tensors["model.layers.0.self_attn.bogus.weight"] = torch.zeros(1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(WeightsError) as raised:
        load_tensors(model, tensors)
    message = str(raised.value)
    assert "missing: mlp_AR.linear_2.bias, model.norm.weight" in message
    assert "mis-shaped: model.embed_tokens.weight is [95, 48] instead of [96, 48]" in message
    assert "unexpected: model.layers.0.self_attn.bogus.weight" in message
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "nothing was written"


def test_a_quantised_checkpoint_is_said_to_be_one(make_model: Any) -> None:
    """One sentence, also where its config.json says nothing of it."""
    model = make_model()
    tensors = dict(model.state_dict().items())
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(WeightsError, match=r"by GPTQ or AWQ \(it holds model.layers.0.self_attn.q_proj.qweight\)"):
        load_tensors(model, tensors)


def test_a_missing_expert_is_named(make_model: Any) -> None:
    model = make_model()
    tensors = per_expert(dict(model.state_dict()))
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(WeightsError, match=r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight$"):
        load_tensors(model, tensors)


def test_parts_that_no_model_reads_are_ignored(make_model: Any) -> None:
    model = make_model()
    extra = {
        "visual.vision_model.head.probe": torch.zeros(1, 1, 32),
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(9, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    assert set(load_tensors(model, {**model.state_dict(), **extra}).ignored) == set(extra)


def test_tensors_that_only_other_loaders_read_are_saved_again(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    table = "visual.vision_model.embeddings.packing_position_embedding.weight"
    extra = {table: torch.arange(288.0).reshape(9, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    (tmp_path / "official").mkdir()
    save_file({**model.state_dict(), **extra}, tmp_path / "official" / WEIGHTS_FILE)
    loaded, _ = load_model(tmp_path / "official", model.config, dtype=torch.float32)
    save_model(loaded, tmp_path / "saved", shard_bytes=20_000)
    again, report = load_model(tmp_path / "saved", model.config, dtype=torch.float32)
    assert report.ignored == (table,), "rotary buffers are no parameters"
    save_model(again, tmp_path / "saved")  # over the files that it came from
    assert torch.equal(load_file(tmp_path / "saved" / WEIGHTS_FILE)[table], extra[table])
    shutil.rmtree(tmp_path / "official")
    with pytest.warns(KeyeWarning, match="cannot be copied"):
        save_model(loaded, tmp_path / "third")


def test_indexer_weights_are_unused_by_a_dense_config(make_model: Any) -> None:
    sparse, dense = make_model(), make_model(sa_config=None)
    report = load_tensors(dense, sparse.state_dict())
    assert len(report.unused) == 2 * 5
    assert all(".sa_indexer." in name for name in report.unused)
    assert report.ignored == ()


def test_conversion_to_another_dtype(tmp_path: Path, make_model: Any) -> None:
    model = make_model()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    loaded, _ = load_model(tmp_path, model.config)
    assert loaded.dtype == torch.bfloat16, "the dtype of the config"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, make_model: Any) -> None:
    folder = tmp_path / "model"
    save_model(make_model(), tmp_path)
    folder.mkdir()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": f"../{WEIGHTS_FILE}"}}))
    with pytest.raises(WeightsError, match="outside its folder"):
        load_model(folder, make_model().config)


def test_broken_and_absent_files(tmp_path: Path, make_model: Any) -> None:
    config = make_model().config
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(WeightsError, match="holds no .safetensors weights"):
        load_model(tmp_path, config)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_model(tmp_path, config)
    with pytest.raises(WeightsError, match="'int4' is not supported"):
        load_model(tmp_path, make_model(torch_dtype="int4").config)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"gone\.safetensors"):
        load_model(tmp_path, config)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(make_model(seed=1), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("keye.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(make_model(seed=2), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS_FILE]


@pytest.mark.parametrize("weight_map", [["lm_head.weight"], "model.safetensors", None, {"lm_head.weight": 3}])
def test_an_index_that_maps_nothing(tmp_path: Path, make_model: Any, weight_map: object) -> None:
    save_model(make_model(), tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="has no weight_map from tensor names to files"):
        load_model(tmp_path, make_model().config)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_must_be_floating_point_numbers(tmp_path: Path, make_model: Any, dtype: torch.dtype) -> None:
    model = make_model()
    tensors = {**model.state_dict(), "model.norm.weight": torch.ones(48).to(dtype)}
    with pytest.raises(WeightsError, match=r"no floating-point numbers that keye reads: model\.norm\.weight is "):
        load_tensors(model, tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=r"no floating-point numbers that keye reads: model\.norm\.weight is "):
        load_model(tmp_path, model.config)
