"""Files that keye writes: llama.cpp runs them, and chooses the same formats tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye.hub import resolve
from keye.version import PACKAGE_FOLDER
from keye.weights.export import export_text
from keye.weights.gguf.dequantize import dequantize
from keye.weights.gguf.reader import read_gguf
from tests.peers import llama_cpp
from tests.peers.models import dense_logits, logits_and_gaps, small_folder, tokens_of
from tests.support.latent import latent_folder

pytestmark = pytest.mark.peer
#: Geometries in which the rules of the mixes differ, by fields of config.json.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "vocab_size": 1792}  # fmt: skip
SPARSE = {"sa_config": {"indexer_num_heads": 2, "indexer_head_dim": 32, "indexer_num_kv_heads": 1, "topk": 16}}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "experts": {**WIDE, **SPARSE, "num_hidden_layers": 17, "num_experts": 4, "moe_intermediate_size": 256},
    "eight experts": {**WIDE, **SPARSE, "num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 256},
    "dense": {**WIDE, "dense": True, "num_hidden_layers": 24},
    "rows of no K format": {**WIDE, **SPARSE, "num_hidden_layers": 9, "num_experts": 4, "moe_intermediate_size": 96},
    "rows of no format": {**WIDE, **SPARSE, "num_hidden_layers": 3, "num_experts": 4, "moe_intermediate_size": 40},
    "narrow": {"num_hidden_layers": 3, "num_experts": 4},
    "narrow and tied": {"dense": True, "num_hidden_layers": 3, "tie_word_embeddings": True, "intermediate_size": 96},
}  # fmt: skip


def formats(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type.name for tensor in read_gguf(path).tensors.values()}


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q3_K_M"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_tensor_gets_the_format_that_llama_cpp_chooses(tmp_path, geometry, file_type):
    fields = GEOMETRIES[geometry]
    folder = small_folder(tmp_path / "model", **fields)
    only = not fields.get("dense", False)
    export_text(folder, tmp_path / "plain.gguf", "BF16", text_only=only)
    export_text(folder, tmp_path / "ours.gguf", file_type, text_only=only)
    llama_cpp.quantize(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", file_type)
    assert formats(tmp_path / "ours.gguf") == formats(tmp_path / "theirs.gguf")


LATENT = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 256,
          "kv_lora_rank": 256, "num_hidden_layers": 9, "vocab_size": 1792}  # fmt: skip


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q3_K_M"])
@pytest.mark.parametrize("changes", [LATENT, {**LATENT, "n_routed_experts": 16}, {}])
def test_every_tensor_of_671b_gets_the_format_that_llama_cpp_chooses(tmp_path, changes, file_type):
    folder = latent_folder(tmp_path / "model", **changes)
    export_text(folder, tmp_path / "plain.gguf", "BF16")
    export_text(folder, tmp_path / "ours.gguf", file_type)
    llama_cpp.quantize(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", file_type)
    assert formats(tmp_path / "ours.gguf") == formats(tmp_path / "theirs.gguf")


def test_llama_cpp_runs_the_text_of_keye_nano(tmp_path):
    folder, tokens = PACKAGE_FOLDER / "assets" / "nano", tokens_of(60)  # up to 64 tokens it attends to all of them
    export_text(folder, tmp_path / "nano.gguf", "F32", text_only=True)
    np.testing.assert_allclose(
        llama_cpp.logits(tmp_path / "nano.gguf", tokens), dense_logits(folder, tokens), atol=1e-3
    )


@pytest.mark.parametrize("geometry", ["experts", "eight experts", "dense", "narrow and tied"])
def test_float32_files_have_the_logits_of_the_checkpoint(tmp_path, geometry):
    fields, tokens = GEOMETRIES[geometry], tokens_of(40)
    folder = small_folder(tmp_path / "model", **fields)
    export_text(folder, tmp_path / "model.gguf", "F32", text_only=not fields.get("dense", False))
    np.testing.assert_allclose(
        llama_cpp.logits(tmp_path / "model.gguf", tokens), dense_logits(folder, tokens), atol=1e-3
    )


@pytest.mark.parametrize(("file_type", "bound"), [("BF16", 0.01), ("Q8_0", 0.03), ("Q4_K_M", 0.03), ("Q3_K_M", 0.03)])
def test_quantised_files_have_the_logits_of_their_own_weights(tmp_path, file_type, bound):
    """Of a dense model, in which no rounding of activations can choose other experts."""
    fields, tokens = {**GEOMETRIES["dense"], "num_hidden_layers": 2}, tokens_of(40)
    folder = small_folder(tmp_path / "model", **fields)
    export_text(folder, tmp_path / "model.gguf", file_type)
    ours, theirs = (
        dense_logits(resolve(tmp_path / "model.gguf"), tokens),
        llama_cpp.logits(tmp_path / "model.gguf", tokens),
    )
    assert np.sqrt(np.square(ours - theirs).mean()) <= bound * theirs.std()


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q3_K_M"])
def test_quantised_experts_have_the_logits_of_their_own_weights(tmp_path, file_type):
    """Of the tokens whose experts are no close call: llama.cpp rounds activations, and may choose others."""
    fields, tokens = {**GEOMETRIES["eight experts"], "num_hidden_layers": 1}, tokens_of(200)
    folder = small_folder(tmp_path / "model", router_scale=8, **fields)
    export_text(folder, tmp_path / "model.gguf", file_type, text_only=True)
    ours, gaps = logits_and_gaps(resolve(tmp_path / "model.gguf"), tokens)
    theirs, safe = llama_cpp.logits(tmp_path / "model.gguf", tokens), gaps > 0.2
    assert safe.sum() > 50
    assert np.sqrt(np.square(ours[safe] - theirs[safe]).mean()) <= 0.03 * theirs.std()


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"n_group": 1, "topk_group": 1}])
def test_the_text_of_671b_is_a_model_that_llama_cpp_runs(tmp_path, changes):
    folder, tokens = latent_folder(tmp_path / "model", **changes), tokens_of(40)
    export_text(folder, tmp_path / "model.gguf", "F32")
    np.testing.assert_allclose(
        llama_cpp.logits(tmp_path / "model.gguf", tokens), dense_logits(folder, tokens), atol=1e-3
    )


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q3_K_M"])
def test_our_reader_and_the_package_gguf_read_the_same_numbers(gguf, tmp_path, file_type):
    folder = small_folder(tmp_path / "model", **GEOMETRIES["eight experts"])
    export_text(folder, tmp_path / "model.gguf", file_type)
    ours = {tensor.name: tensor for tensor in read_gguf(tmp_path / "model.gguf").tensors.values()}
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        info = ours.pop(tensor.name)
        data = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.start)
        np.testing.assert_array_equal(
            dequantize(info.type, data), gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        )
    assert not ours
