"""Keye-VL-2.0 for vLLM: keye's vision tower and projector before a decoder in vLLM's layers, under the official names.

The tower is small beside the decoder (0.45 of 31 billion parameters) and whole on every tensor parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from keye import KeyeError
from keye.spi import IGNORED, INDEXER, Projector, Visual, build_position_ids, encode_vision
from keye_vllm.decoder import Decoder
from keye_vllm.media import FIELDS, DummyMedia, MediaInfo, MediaProcessor


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=MediaInfo, dummy_inputs=DummyMedia)
class KeyeVL2MoeForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """Keye-VL-2.0 with experts; without `sa_config` a dense model."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a medium in a prompt that is written by a chat template."""
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config.keye
        text = config.text
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # type: ignore[operator]  # of vLLM, which is not installed here
            self.visual = Visual(config.vision)
            self.mlp_AR = Projector(config.vision, text.hidden_size)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.model = Decoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
            self.lm_head = ParallelLMHead(
                text.vocab_size, text.hidden_size, quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )  # fmt: skip
            if text.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(text.vocab_size)

    def embed_multimodal(self, **fields: Any) -> list[Tensor]:
        """Visual tokens [n, d] of each medium of one kind, in order."""
        tokens: list[Tensor] = []
        for names in FIELDS.values():
            if fields.get(names.pixels) is not None:
                rows = fields[names.grid]
                encoded = encode_vision(self.visual, self.mlp_AR, fields[names.pixels], rows)
                sizes = rows.prod(-1) // self.config.vision.spatial_merge_size**2
                tokens += encoded.split(
                    [int(part.sum()) for part in sizes.split(fields[names.rows].flatten().tolist())]
                )
        return tokens

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions int64 [3, T] as keye lays them out, and what is added to a length to get the next one."""
        pads = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        ids = np.full(len(input_tokens), -1)  # placeholders that belong to no medium are text
        grids: dict[int, list[Any]] = {}
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place, pad = feature.mm_position, pads[feature.modality]
            inside = np.ones(place.length, dtype=bool) if place.is_embed is None else place.is_embed.numpy()
            ids[place.offset : place.offset + place.length][inside] = pad
            if feature.data is None:
                raise ValueError("positions need the grids of all media")
            grids.setdefault(pad, []).append(feature.data[FIELDS[feature.modality].grid].data.reshape(-1, 3))
        rows = {pad: np.concatenate(parts) for pad, parts in grids.items()}
        positions, delta = build_position_ids(ids, rows, merge_size=self.config.vision.spatial_merge_size)
        return torch.from_numpy(positions), delta

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Ids [T] or embeddings [T, d], positions int [3, T] -> hidden states [T, d]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[n, d] -> [n, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Official files, experts fused or one by one; vLLM names every parameter that was not in them."""
        return AutoWeightsLoader(self).load_weights(self._needed(weights))

    def _needed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a forward pass reads. `KeyeError` after a file without an indexer under a config that has
        one: it would be dense attention beyond k, which is another function."""
        sparse, indexer = self.config.text.sparse is not None, False
        for name, tensor in weights:
            indexer = indexer or INDEXER in name
            if not IGNORED.search(name) and (sparse or INDEXER not in name):
                yield name, tensor
        if sparse and not indexer:
            raise KeyeError(
                "the checkpoint holds no indexer (self_attn.sa_indexer.*), which its config.json describes: fetch it "
                "again, or serve it with dense attention (--hf-overrides '{\"sa_config\": null}')"
            )


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=MediaInfo, dummy_inputs=DummyMedia)
class KeyeVL2ForConditionalGeneration(KeyeVL2MoeForConditionalGeneration):
    """Keye-VL-2.0 with dense MLPs."""
