"""Vision pre-training: pictures at their native resolution against their captions, by SigLIP's sigmoid loss.

The tower interpolates its learnt positions to each picture's grid and turns queries and keys by 2-D RoPE, as in
inference. Its text tower and pooling head are made for the stage and not kept.

Legend: n pairs, L tokens of a caption, C channels of the tower, W width of the text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.train.layout import LaidOut
from keye.train.losses import siglip_loss
from keye.train.packing import Array
from keye.train.pairs import reply_text
from keye.train.recipe import AddUp, Figures
from keye.train.recipes.family.batches import Batches
from keye.train.recipes.family.config import FamilyStage, SiglipConfig


@dataclass(frozen=True)
class CaptionBatch(Generic[Array]):
    """n pictures with captions: `pixels` float32 [patches, 3, side, side] of all, `grids` int64 [n, 3]; `token_ids`
    int64 [n, L], -1 after the end of a caption; `weight`, the share of the pairs that count."""

    pixels: Array
    grids: Array
    token_ids: Array
    weight: float


class CaptionBatches(Batches):
    """`batch` pairs a step, divided among the processes; each picture is compared with the captions of its process."""

    @property
    def is_packed(self) -> bool:
        return False

    def check(self, sample: LaidOut) -> None:
        if [medium.kind for medium in sample.sample.media] != ["image"]:
            raise KeyeError("vision pre-training takes one image with its caption")

    def weigh(self, sample: LaidOut) -> float:
        return 1.0

    def make_micro(self, samples: Sequence[LaidOut], figures: dict[str, float]) -> list[Any]:
        own = samples[self.rank :: self.size] or samples[:1]
        visions = [sample.paths[0].media[0].vision for sample in own]
        encode, most = self.reader.layout.builder.tokenizer.encode, self.stage.siglip.tokens
        captions = [encode(reply_text(sample.sample))[:most] for sample in own]
        token_ids = np.full((len(own), max(map(len, captions))), -1, np.int64)
        for row, caption in zip(token_ids, captions, strict=True):
            row[: len(caption)] = caption
        return [
            CaptionBatch(
                np.concatenate([vision.pixel_values for vision in visions]),
                np.concatenate([vision.grid_thw for vision in visions]).astype(np.int64),
                token_ids,
                float(self.rank < len(samples)),
            )
        ]


class TextTower(nn.Module):
    """Captions -> embeddings: a transformer over tokens, the mean of its outputs, a linear map."""

    def __init__(self, settings: SiglipConfig, vocabulary: int, channels: int) -> None:
        super().__init__()
        width = settings.width
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(settings.tokens, width) * 0.01)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, channels)

    def forward(self, token_ids_NL: Tensor) -> Tensor:
        """[n, C]."""
        absent = token_ids_NL < 0
        x = self.tokens(token_ids_NL.clamp_min(0)) + self.positions[: token_ids_NL.shape[1]]
        x = self.layers(x, src_key_padding_mask=absent).masked_fill(absent[:, :, None], 0.0)
        return self.head(x.sum(1) / (~absent).sum(1, keepdim=True))


class PoolingHead(nn.Module):
    """Features of patches -> one embedding, by attention from a learnt query and an MLP, as in SigLIP."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, channels) * channels**-0.5)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, features_PC: Tensor) -> Tensor:
        """[C]."""
        features = features_PC.unsqueeze(0)
        pooled = self.attention(self.query, features, features, need_weights=False)[0]
        return (pooled + self.mlp(self.norm(pooled)))[0, 0]


class SiglipHeads(nn.Module):
    """What is trained beside the tower."""

    def __init__(self, settings: SiglipConfig, model: KeyeModel) -> None:
        super().__init__()
        vision = model.config.vision
        self.text = TextTower(settings, model.config.text.vocab_size, vision.hidden_size)
        self.pool = PoolingHead(vision.hidden_size, vision.num_attention_heads)
        self.scale = nn.Parameter(torch.tensor(settings.temperature).log())
        self.bias = nn.Parameter(torch.tensor(settings.bias))


class SiglipObjective:
    """The sigmoid loss of pictures and captions, and how often a caption is closest to its own picture."""

    def __init__(self, stage: FamilyStage, model: KeyeModel) -> None:
        if not model.config.has_vision:
            raise KeyeError(f"stage {stage.name!r} trains the vision tower, which the model does not have")
        self.figures = Figures()
        self.heads: SiglipHeads = SiglipHeads(stage.siglip, model)

    def finish_step(self, add_up: AddUp) -> None:
        """Nothing is counted over a step."""

    def loss(self, model: KeyeModel, micro: CaptionBatch[Tensor], count: float) -> Tensor:
        heads, pixels = self.heads, micro.pixels.to(model.dtype).flatten(1)
        sizes = micro.grids.prod(1).tolist()
        images = []
        for patches, (_, height, width) in zip(pixels.split(sizes), micro.grids.tolist(), strict=True):
            features = model.visual.vision_model(patches.unsqueeze(0), height, width)[0]
            images.append(heads.pool(features.float()))
        x, y = torch.stack(images), heads.text(micro.token_ids)
        loss = siglip_loss(x, y, heads.scale, heads.bias)
        if micro.weight:
            with torch.no_grad():
                nearest = (nn.functional.normalize(x, dim=1) @ nn.functional.normalize(y, dim=1).mT).argmax(1)
            self.figures.add("loss", float(loss.detach()))
            self.figures.add("nearest", float((nearest == torch.arange(len(x), device=x.device)).sum()), len(x))
        return micro.weight * loss * len(images) / count
