"""The configuration of a decoder: sizes, rotary embedding, attention and routing, as every release has them.

Reading a `config.json` into it is in `keye.config.model` and, for the decoder of Keye-VL-671B, `keye.config.latent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SparseConfig:
    """`sa_config`: the DeepSeek Sparse Attention indexer. One key head; `topk` keys are kept for each query."""

    indexer_num_heads: int
    indexer_head_dim: int
    topk: int
    indexer_num_kv_heads: int = 1


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention of DeepSeek-V3: keys and values of all heads are expanded from one latent of
    `kv_lora_rank` numbers, and all heads share one rotary key of `qk_rope_head_dim`. Queries come from a latent of
    `q_lora_rank`, or straight from the hidden state where that is None."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None


@dataclass(frozen=True)
class GroupRouting:
    """Routing of DeepSeek-V3: sigmoid scores, and a bias that takes part in the choice alone. The experts are
    `n_group` equal groups, of which the `topk_group` with the highest sums of two scores are open to a token. Weights
    are multiplied by `routed_scaling_factor`."""

    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv:2309.00071): how rotary frequencies are stretched from a context of
    `original_max_position_embeddings` to one `factor` times as long. `mscale` and `mscale_all_dim` are DeepSeek's, 0
    where a file has none."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def rotation_scale(self) -> float:
        """What cosines and sines are multiplied by, as transformers has it: DeepSeek's code differs for files that have
        only one of the two numbers, which no release does."""
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by beyond the width of queries."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `num_experts == 0` means every layer has a dense MLP.

    With `latent` attention `head_dim` is that of queries and keys, nope and rotary part, and every head has keys and
    values of its own. Without `uses_mrope` visual tokens count one position each, as text does. `draft_layers` follow
    the last one in the files, for speculative decoding; keye does not read them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    sparse: SparseConfig | None = None
    latent: LatentConfig | None = None
    group_routing: GroupRouting | None = None
    n_shared_experts: int = 0
    yarn: YarnConfig | None = None
    uses_mrope: bool = True
    draft_layers: int = 0

    @property
    def rotary_dim(self) -> int:
        """Numbers of a query or key that are rotated."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (0-based) routes to experts."""
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    def indexer_mrope_section(self) -> tuple[int, int, int]:
        """The main M-RoPE sections scaled to the indexer's head dimension (16,24,24 at 128 -> 8,12,12 at 64)."""
        assert self.sparse is not None
        ratio = self.sparse.indexer_head_dim / self.head_dim
        t, h, w = (int(s * ratio) for s in self.mrope_section)
        return t, h, w
