"""Settings and checkpoints that the plug-in cannot honour get one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import keye_vllm
from checkpoints import random_checkpoint
from conftest import StartEngine
from keye.errors import KeyeError
from keye_vllm.media import WholeFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("refused") / "model")


def test_a_checkpoint_without_an_indexer(tmp_path: Path, start_engine: StartEngine) -> None:
    folder = random_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".sa_indexer." not in name}, file)
    with pytest.raises(KeyeError, match=r"no indexer .*--hf-overrides '\{\"sa_config\": null\}'"):
        start_engine(folder)


def test_a_checkpoint_without_another_tensor(tmp_path: Path, start_engine: StartEngine) -> None:
    folder = random_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.sa_indexer.k_norm.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="not initialized from checkpoint.*sa_indexer.k_norm.bias"):
        start_engine(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 32}, "--block-size is 32: sparse attention has KV blocks of 64 tokens"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype is fp8: the plug-in stores plain numbers"),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2},
            "experts on CPUs .* use tensor parallelism alone",
        ),
    ],
)
def test_settings(options: dict[str, Any], sentence: str, folder: Path, start_engine: StartEngine) -> None:
    with pytest.raises(ValueError, match=sentence):
        start_engine(folder, **options)


def test_a_config_that_keye_refuses(tmp_path: Path, start_engine: StartEngine) -> None:
    folder = random_checkpoint(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="hidden_act"):
        start_engine(folder)


def test_options_of_loading() -> None:
    """Frames are sampled by keye, so vLLM's own options for it would have no effect."""
    with pytest.raises(KeyeError, match="media_io_kwargs has fps: give options of videos as mm_processor_kwargs"):
        WholeFile.load_bytes(b"", fps=1)


def test_registering_again_changes_nothing() -> None:
    keye_vllm.register()
    keye_vllm.register()
