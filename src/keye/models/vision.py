"""The vision tower (SigLIP at native resolution) and the projector into the decoder.

Legend: N segments of one size, P patches of a segment (t * h * w, raster order), C channels, d decoder width.
A segment is what attends to itself: one frame (Keye-VL 1.5 and later; t = 1), or all frames of a grid row (Preview).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.config import VisionConfig
from keye.errors import KeyeError
from keye.models.layers import Layer, embedding
from keye.ops.reference import inverse_frequencies

#: Patches that pass through the tower at once; segments are never cut. The value of the official server.
PATCHES_PER_CHUNK = 8192
PROJECTOR_EPS = 1e-5


class VisionAttention(Layer):
    """Full attention inside each segment, with 2-D rotary embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_NPC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`cos`, `sin` float32 [P, head_dim/2]."""
        q, k, v = (proj(x_NPC).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.elementwise.rotate(q, cos, sin), self.elementwise.rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1 x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cos, sin)
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """Patch projection plus the learned position table, interpolated to the frame's grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size  # of the square table of positions
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = embedding(self.side**2, config.hidden_size)

    def forward(self, patches: Tensor, height: int, width: int) -> Tensor:
        """`patches` [N, P, 3 * patch * patch] -> [N, P, C]. The convolution over one patch is a matrix product."""
        weight, frames = self.patch_embedding.weight.flatten(1), patches.shape[1] // (height * width)
        return F.linear(patches, weight, self.patch_embedding.bias) + self.positions(height, width).repeat(frames, 1)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table resampled bilinearly (no antialias) to a frame of `height` x `width` patches:
        [height * width, C]."""
        square = self.position_embedding.weight.view(self.side, self.side, -1).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(square, size=(height, width), mode="bilinear", align_corners=False)
        return resized.squeeze(0).flatten(1).t()


class VisionModel(nn.Module):
    """Patches of frames -> features of patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})  # a level of its own in the names of tensors
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches_NPX: Tensor, height: int, width: int) -> Tensor:
        """Segments of frames of one size: [N, P, 3*patch*patch] -> [N, P, C]."""
        x = self.embeddings(patches_NPX, height, width)
        frames = x.shape[1] // (height * width)
        cos, sin = (angles.repeat(frames, 1) for angles in self.rope(height, width, x.device))
        for layer in self.encoder["layers"].children():
            x = layer(x, cos, sin)
        return self.post_layernorm(x)

    def rope(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """2-D rotary angles of a frame: the first half of the frequencies turns with the row, the rest with the column.

        Returns cos and sin, float32 [height * width, head_dim / 2].
        """
        inv_freq = inverse_frequencies(self.config.head_dim // 2, self.config.rope_theta, device)
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        angles = torch.cat((rows[:, None] * inv_freq, columns[:, None] * inv_freq), dim=1)
        return angles.cos(), angles.sin()


class Visual(nn.Module):
    """Holds the vision model under the name that checkpoints use (`visual.vision_model`). With `recompute`, a chunk of
    frames keeps its patches alone for the backward pass, which computes it again."""

    recompute = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


class Projector(nn.Module):
    """Merges 2x2 neighbouring patches and projects them to the decoder: LayerNorm, linear, GELU (erf), linear.

    The norm is over the merged patches, or in Preview over each patch before the merge.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.merge, self.norm_before_merge = config.spatial_merge_size, config.norm_before_merge
        width = config.hidden_size * self.merge**2
        self.pre_norm = nn.LayerNorm(config.hidden_size if self.norm_before_merge else width, eps=PROJECTOR_EPS)
        self.hidden_size = hidden_size
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, hidden_size)

    def forward(self, x_NPC: Tensor, height: int, width: int) -> Tensor:
        """[N, P, C] -> [N * P / merge**2, d]; the merged block holds its patches row by row."""
        m = self.merge
        x = self.pre_norm(x_NPC) if self.norm_before_merge else x_NPC
        x = x.unflatten(1, (-1, m, width // m, m)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        x = (x if self.norm_before_merge else self.pre_norm(x)).flatten(0, 2)
        return self.linear_2(F.gelu(self.linear_1(x)))


class VisionTower(nn.Module):
    """Vision tower and projector without a decoder, under the names that a whole model gives them."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.visual = Visual(config)
        self.mlp_AR = Projector(config, hidden_size)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches [P, 3, patch, patch] and grids int [rows, 3] -> visual tokens [P / merge**2, d]."""
        return encode_vision(self.visual, self.mlp_AR, pixel_values, grid_thw)


def encode_vision(visual: Visual, projector: Projector, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Frames -> merged visual tokens in order, [tokens, d].

    `pixel_values` [patches, 3, patch, patch] in (t, h, w) raster order, `grid_thw` int [rows, 3] in patches. Where
    attention is per frame a row (t, h, w) is the same as t rows (1, h, w). Segments are processed in chunks of at most
    `PATCHES_PER_CHUNK` patches; the result does not depend on the chunk.
    """
    model = visual.vision_model
    weight = model.embeddings.patch_embedding.weight

    def encode(patches: Tensor, height: int, width: int) -> Tensor:
        return projector(model(patches.to(weight.dtype), height, width), height, width)

    if visual.recompute and torch.is_grad_enabled():
        encode = partial(checkpoint, encode, use_reentrant=False)
    segments = _split_segments(model.config, projector.merge, pixel_values, grid_thw)
    pieces = [encode(patches, height, width) for patches, height, width in _chunks(pixel_values, segments)]
    return torch.cat(pieces) if pieces else weight.new_zeros(0, projector.hidden_size)


def encode_tower(visual: Visual, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """The first part of `encode_vision`: features of patches before the projector, [patches, C]."""
    model = visual.vision_model
    weight = model.embeddings.patch_embedding.weight
    segments = _split_segments(model.config, model.config.spatial_merge_size, pixel_values, grid_thw)
    pieces = [model(part.to(weight.dtype), *size).flatten(0, 1) for part, *size in _chunks(pixel_values, segments)]
    return torch.cat(pieces) if pieces else weight.new_zeros(0, model.config.hidden_size)


def project_features(config: VisionConfig, projector: Projector, features: Tensor, grid_thw: Tensor) -> Tensor:
    """The second part: features of patches [patches, C] -> merged visual tokens [tokens, d]."""
    segments = _split_segments(config, projector.merge, features, grid_thw)
    pieces = [projector(part, height, width) for part, height, width in _chunks(features, segments)]
    return torch.cat(pieces) if pieces else features.new_zeros(0, projector.hidden_size)


def _split_segments(config: VisionConfig, merge: int, patches: Tensor, grid_thw: Tensor) -> list[tuple[int, int, int]]:
    """What attends to itself, (t, h, w) each; `KeyeError` for grids that do not fit the patches or the merge."""
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    expected = sum(t * h * w for t, h, w in grids)
    if expected != patches.shape[0]:
        raise KeyeError(f"grid_thw stands for {expected} patches but pixel_values holds {patches.shape[0]}")
    for _, height, width in grids:
        if height % merge or width % merge:
            raise KeyeError(f"a frame of {height} x {width} patches does not divide into {merge} x {merge} blocks")
    return grids if config.whole_video_attention else [(1, h, w) for t, h, w in grids for _ in range(t)]


def _chunks(pixel_values: Tensor, segments: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, int, int]]:
    """Yields runs of equally large segments, `(patches [N, P, X], height, width)`, at most a chunk each."""
    flat, offset = pixel_values.flatten(1), 0
    for (frames, height, width), group in groupby(segments):
        size, count = frames * height * width, len(list(group))
        step = max(1, PATCHES_PER_CHUNK // size)
        run = flat[offset : offset + count * size].unflatten(0, (count, size))
        offset += count * size
        for begin in range(0, count, step):
            yield run[begin : begin + step], height, width
