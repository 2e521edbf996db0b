"""The vision tower: frames are independent of one another and of how they are chunked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keye.errors import KeyeError
from keye.models import vision

GRIDS = torch.tensor([[1, 4, 6], [3, 4, 6], [1, 2, 2], [2, 6, 4]])


def patches(seed: int = 0) -> torch.Tensor:
    count = int(GRIDS.prod(1).sum())
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 30, 60, 10_000])
def test_chunks_change_nothing(chunk: int, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = make_model(), patches()
    with torch.no_grad():
        want = model.encode_vision(pixels, GRIDS)
        monkeypatch.setattr(vision, "PATCHES_PER_CHUNK", chunk)
        got = model.encode_vision(pixels, GRIDS)
    assert got.shape == (len(pixels) // 4, 48)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_each_frame_alone_gives_the_same_tokens(make_model: Any) -> None:
    model, pixels, start, alone = make_model(), patches(), 0, []
    with torch.no_grad():
        for t, h, w in GRIDS.tolist():
            for _ in range(t):
                alone.append(model.encode_vision(pixels[start : start + h * w], torch.tensor([[1, h, w]])))
                start += h * w
        torch.testing.assert_close(model.encode_vision(pixels, GRIDS), torch.cat(alone), rtol=0, atol=1e-5)


def test_no_media_gives_no_tokens(make_model: Any) -> None:
    got = make_model().encode_vision(torch.zeros(0, 3, 14, 14), torch.zeros(0, 3, dtype=torch.int64))
    assert got.shape == (0, 48)


def test_grids_must_fit_the_pixels(make_model: Any) -> None:
    model = make_model()
    with pytest.raises(KeyeError, match="grid_thw stands for 8 patches but pixel_values holds 7"):
        model.encode_vision(torch.zeros(7, 3, 14, 14), torch.tensor([[1, 2, 4]]))
    with pytest.raises(KeyeError, match="3 x 2 patches does not divide into 2 x 2 blocks"):
        model.encode_vision(torch.zeros(6, 3, 14, 14), torch.tensor([[1, 3, 2]]))


def test_positions_at_the_native_grid_are_the_table(make_model: Any) -> None:
    embeddings = make_model().visual.vision_model.embeddings
    torch.testing.assert_close(embeddings.positions(4, 4), embeddings.position_embedding.weight, rtol=0, atol=1e-6)
    assert embeddings.positions(6, 8).shape == (48, 32)


def test_merged_blocks_hold_their_patches_row_by_row(make_model: Any) -> None:
    """Swapping two patches of one block changes that block's token and no other."""
    projector = make_model().mlp_AR
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    swapped = x.clone()
    swapped[0, [0, 5]] = x[0, [5, 0]]  # (0, 0) and (1, 1) of the first block of a 4 x 4 grid
    with torch.no_grad():
        changed = (projector(x, 4, 4) - projector(swapped, 4, 4)).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, False, False]


# Preview


@pytest.fixture
def preview_model(make_model: Any) -> Any:
    return make_model(architectures=["KeyeForConditionalGeneration"], sa_config=None)


def test_preview_frames_of_one_row_see_each_other_and_no_other_row(preview_model: Any) -> None:
    """A change in the last frame of the first video reaches all of it and nothing else."""
    grids = torch.tensor([[3, 4, 6], [1, 4, 6], [3, 4, 6]])
    pixels = torch.randn(7 * 24, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    changed = pixels.clone()
    changed[2 * 24 + 5] += 1.0
    with torch.no_grad():
        difference = preview_model.encode_vision(pixels, grids) - preview_model.encode_vision(changed, grids)
    assert ((difference.abs().amax(1) > 1e-6).tolist()) == [True] * 18 + [False] * 24


@pytest.mark.parametrize("chunk", [1, 100, 10_000])
def test_preview_chunks_change_nothing(chunk: int, preview_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = patches()
    with torch.no_grad():
        want = preview_model.encode_vision(pixels, GRIDS)
        monkeypatch.setattr(vision, "PATCHES_PER_CHUNK", chunk)
        torch.testing.assert_close(preview_model.encode_vision(pixels, GRIDS), want, rtol=0, atol=1e-5)


def test_preview_normalises_each_patch_before_the_merge(preview_model: Any) -> None:
    """Scaling one patch is undone by its own norm, so no token changes; over merged patches it would not be."""
    projector = preview_model.mlp_AR
    assert projector.pre_norm.weight.shape == (32,)
    x = 10 * torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    scaled = x.clone()
    scaled[0, 3] *= 7.0
    with torch.no_grad():
        torch.testing.assert_close(projector(x, 4, 4), projector(scaled, 4, 4), rtol=0, atol=1e-4)
