"""The whole network: vision tower, projector, decoder, head. Module names are the official checkpoint's.

Legend: T tokens of a ragged step, d model width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.config import KeyeConfig, TextConfig
from keye.errors import KeyeError
from keye.models.adapters import AdapterRows
from keye.models.attention import Attention, Indexer, Numerics, Rope, Step, cache_rows
from keye.models.latent import LatentAttention
from keye.models.layers import MLP, Layer, Linear, RMSNorm, embedding
from keye.models.moe import MoE
from keye.models.vision import Projector, Visual, encode_vision
from keye.ops.elementwise import Elementwise
from keye.ops.kv_blocks import RowSpec
from keye.ops.reference import inverse_frequencies, rope_angles, yarn_frequencies
from keye.quant.layers import QuantEmbedding, QuantLinear


class DecoderLayer(Layer):
    """Pre-norm attention, then pre-norm MLP or experts."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(config, layer) if config.latent is None else LatentAttention(config, layer)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        """[T, d] -> [T, d]."""
        attended = self.self_attn(self.input_layernorm(x), rope, step)
        norm = self.post_attention_layernorm
        x, normed = self.elementwise.add_rms_norm(x, attended, norm.weight, norm.eps)
        if isinstance(self.mlp, MoE):
            out, logits, chosen = self.mlp(normed)
            step.observe_router(self.layer, logits, chosen)
        else:
            out = self.mlp(normed)
        x = x + out
        step.observe_layer(self.layer, x)
        return x


class Decoder(nn.Module):
    """Token embeddings, layers, final norm. With `recompute`, a layer keeps its input alone for the backward pass,
    which computes the layer again."""

    recompute = False

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """Embeddings [T, d] and positions int64 [3, T] -> normalised hidden states [T, d]."""
        rope = self.rope(position_ids)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, step, use_reentrant=False)
            else:
                x = layer(x, rope, step)
        return self.norm(x)

    def rope(self, position_ids: Tensor) -> Rope:
        """Rotary angles of the attention and, in sparse models, of the indexer."""
        config, device, yarn = self.config, position_ids.device, self.config.yarn
        if yarn is None:
            inv_freq = inverse_frequencies(config.rotary_dim, config.rope_theta, device)
        else:
            inv_freq = yarn_frequencies(
                config.rotary_dim, config.rope_theta, yarn.factor, yarn.original_max_position_embeddings,
                yarn.beta_fast, yarn.beta_slow, device,
            )  # fmt: skip
        cos, sin = rope_angles(position_ids, inv_freq, config.mrope_section)
        if yarn is not None:
            cos, sin = cos * yarn.rotation_scale, sin * yarn.rotation_scale
        if config.sparse is None:
            return Rope(cos, sin, None, None)
        indexer_freq = inverse_frequencies(config.sparse.indexer_head_dim, float(int(config.rope_theta)), device)
        return Rope(cos, sin, *rope_angles(position_ids, indexer_freq, config.indexer_mrope_section()))


def visual_mask(config: KeyeConfig, token_ids: Tensor) -> Tensor:
    """Which of `token_ids` int64 [T] are placeholders of visual tokens: bool [T]."""
    return (token_ids == config.image_token_id) | (token_ids == config.video_token_id)


class KeyeModel(Layer):
    """Keye-VL as one module; built on any device, including `meta`.

    `origin` is the folder it was loaded from if that holds tensors which no forward pass reads and saving must keep.
    `adapter_rows` says which rows of a pass use which adapter; nothing of it is among the model's tensors.
    """

    origin: Path | None = None
    #: How often the weights were replaced in place (`keye.models.load.update_tensors`).
    weights_version = 0

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config, self.adapter_rows = config, AdapterRows()
        text = config.text
        if config.has_vision:
            self.visual = Visual(config.vision)
            self.mlp_AR = Projector(config.vision, text.hidden_size)
        self.model = Decoder(text)
        self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes head and embeddings one parameter where the config says so; needed again after `to_empty`."""
        table = self.model.get_submodule("embed_tokens")
        if self.is_tied and isinstance(table, QuantEmbedding):
            self.lm_head = QuantLinear(table.weight)  # type: ignore[assignment]
        elif self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def is_tied(self) -> bool:
        """Whether head and embeddings are one parameter."""
        return self.config.text.tie_word_embeddings

    def cache_rows(self) -> dict[str, RowSpec]:
        """What the model stores of each token, by name."""
        return cache_rows(self.config.text)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of activations and of weights that are not quantised."""
        return self.model.norm.weight.dtype

    def set_elementwise(self, elementwise: Elementwise) -> None:
        """Chooses the versions of the small operations that this model's layers call."""
        for module in self.modules():
            if isinstance(module, Layer):
                module.elementwise = elementwise

    def set_recompute(self, recompute: bool) -> None:
        """Whether layers and vision chunks keep their inputs alone for the backward pass, and are computed again in it:
        memory of a few layers in place of all, for about a third more work."""
        self.model.recompute = recompute
        if self.config.has_vision:
            self.visual.recompute = recompute

    def set_indexer_numerics(self, numerics: Numerics) -> None:
        """Chooses how every indexer rounds; see `keye.models.attention.Numerics`."""
        for module in self.modules():
            if isinstance(module, Indexer):
                module.numerics = numerics

    def encode_vision(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches [P, 3, 14, 14] and grids int [rows, 3] -> visual tokens [P / 4, d]."""
        return encode_vision(self.visual, self.mlp_AR, pixel_values, grid_thw)

    def embed(self, token_ids: Tensor, visual_tokens: Tensor | None = None) -> Tensor:
        """Token embeddings [T, d] with `visual_tokens` written over the image and video placeholders in order."""
        x = self.model.embed_tokens(token_ids)
        is_visual = visual_mask(self.config, token_ids)
        wanted, present = int(is_visual.sum()), 0 if visual_tokens is None else visual_tokens.shape[0]
        if wanted != present:
            raise KeyeError(f"the prompt has {wanted} visual placeholders but the media have {present} visual tokens")
        if visual_tokens is not None and present:
            x = x.masked_scatter(is_visual.unsqueeze(-1), visual_tokens.to(x.dtype))
        return x

    def forward(self, x: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """Embeddings [T, d], positions int64 [3, T] -> hidden states [T, d] after the final norm."""
        return self.model(x, position_ids, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> float32 [n, V]."""
        return self.lm_head(hidden).float()
