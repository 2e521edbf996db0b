"""Features of media are computed once while nothing that computes them is trained, and are those of a run without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keye.chat.messages import Medium
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.train.features import FeatureCache, choose_stored, digest_of, encode_media, open_features
from keye.train.packing import Packed, load, pack
from keye.train.recipe import move_batch
from tests.support.layouts import moving_frames, nano_layout, sample
from tests.support.tiny import tiny_model

DECODER, PROJECTOR, TOWER = "model.layers.0.mlp.gate.weight", "mlp_AR.linear_1.weight", "visual.vision_model.x"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> KeyeModel:
    return tiny_model().model.bfloat16()


def load_pack(cache: FeatureCache | None, *seeds: int) -> Packed[Tensor]:
    layout = nano_layout()
    media = [Medium("video", moving_frames(seed, 2 + seed, 56)) for seed in seeds]
    samples = [layout.lay_out(sample((medium, "what is red?"), "circle", line=i)) for i, medium in enumerate(media)]
    (full,) = pack(samples, 10_000)
    packed: Packed[Tensor] = move_batch(load(full, cache), CPU)
    return packed


def open_cache(model: KeyeModel, folder: Path, *trained: str, limit: int = 1 << 20) -> FeatureCache:
    cache = open_features(model, trained, folder, limit=limit)
    assert cache is not None
    return cache


@pytest.mark.parametrize("trained", [(DECODER,), (DECODER, PROJECTOR)])
def test_cached_features_give_the_same_visual_tokens(model: KeyeModel, trained: Any, tmp_path: Path) -> None:
    expected = encode_media(model, load_pack(None, 0, 1, 2))
    assert expected is not None
    cache = open_cache(model, tmp_path, *trained)
    first = load_pack(cache, 1)
    assert first.features is None and not first.media[0].cached
    encode_media(model, first, cache)
    mixed = load_pack(cache, 0, 1, 2)  # two are new, one between them is cached
    assert [medium.cached for medium in mixed.media] == [False, True, False]
    assert torch.equal(encode_media(model, mixed, cache), expected)  # type: ignore[arg-type]
    packed = load_pack(cache, 0, 1, 2)
    assert packed.pixels is None and all(medium.cached for medium in packed.media)
    tokens = encode_media(model, packed, cache)
    assert tokens is not None and torch.equal(tokens, expected)
    assert tokens.requires_grad == (PROJECTOR in trained)


def test_a_projector_that_is_trained_gets_its_gradient_from_kept_patches(model: KeyeModel, tmp_path: Path) -> None:
    gradients = []
    cache = open_cache(model, tmp_path, PROJECTOR)
    encode_media(model, load_pack(cache, 0, 1), cache)
    for packed, used in ((load_pack(None, 0, 1), None), (load_pack(cache, 0, 1), cache)):
        model.zero_grad()
        encode_media(model, packed, used).float().square().sum().backward()  # type: ignore[union-attr]
        gradients.append(model.mlp_AR.linear_1.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*gradients)


def test_what_is_kept_follows_what_is_trained() -> None:
    assert choose_stored([DECODER]) == "tokens"
    assert choose_stored([DECODER, PROJECTOR]) == "patches"
    assert choose_stored([DECODER, TOWER]) is None


def test_other_weights_and_dtypes_have_other_features(model: KeyeModel, tmp_path: Path) -> None:
    cache = open_cache(model, tmp_path, DECODER)
    encode_media(model, load_pack(cache, 0), cache)
    others = [tiny_model(seed=1).model.bfloat16(), tiny_model().model]
    for other in others:
        assert load_pack(open_cache(other, tmp_path, DECODER), 0).features is None
    assert load_pack(open_cache(model, tmp_path, PROJECTOR), 0).features is None
    assert load_pack(open_cache(model, tmp_path, DECODER), 0).pixels is None
    changed = tiny_model().model.bfloat16()
    changed.model.embed_tokens.weight.data.zero_()  # computes no features
    assert digest_of(changed, "tokens") == digest_of(model, "tokens")


def test_the_folder_stays_within_its_limit_and_keeps_what_was_used_last(model: KeyeModel, tmp_path: Path) -> None:
    size = 3 * 4 * 64 * 2 + 200  # of seed 1: three frames of four tokens
    cache = open_cache(model, tmp_path, DECODER, limit=4 * size)
    for seed in (1, 2, 3, 4, 5):
        encode_media(model, load_pack(cache, seed), cache)
        assert load_pack(cache, seed).pixels is None
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * size + 5000
    assert load_pack(cache, 1).pixels is not None
    small = open_cache(model, tmp_path / "small", DECODER, limit=100)
    encode_media(model, load_pack(small, 1), small)
    assert not (tmp_path / "small").exists()


def test_damaged_files_are_computed_again(model: KeyeModel, tmp_path: Path) -> None:
    cache = open_cache(model, tmp_path, DECODER)
    encode_media(model, load_pack(cache, 0), cache)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert load_pack(cache, 0).pixels is not None


def test_a_folder_that_cannot_be_written_is_named(model: KeyeModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = open_cache(model, tmp_path / "file" / "features", DECODER)
    with pytest.raises(KeyeError, match="features cannot keep visual features"):
        encode_media(model, load_pack(cache, 0), cache)
