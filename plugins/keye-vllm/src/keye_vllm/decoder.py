"""The decoder of Keye-VL-2.0 in vLLM's layers, with keye's indexer and sparse attention.

Tensor parallel ranks share heads and experts; indexers are whole on every rank, so that all ranks choose the same keys.
Legend: T tokens of the step, d model width.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from keye.spi import Indexer, Rope, TextConfig, inverse_frequencies, norm_rotate, rope_angles
from keye.spi import RMSNorm as HeadNorm
from keye_vllm.attention import SparseAttention

#: Official names to the names of vLLM's merged layers. The indexer has a `q_proj` and a `k_proj` of its own.
_MERGED = WeightsMapper(
    orig_to_new_stacked={
        ".self_attn.q_proj": (".self_attn.qkv_proj", "q"),
        ".self_attn.k_proj": (".self_attn.qkv_proj", "k"),
        ".self_attn.v_proj": (".self_attn.qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    }
)


class DecoderAttention(nn.Module):
    """Projections, norms of heads, rotary embedding, sparse attention; vLLM's own attention in a model without
    `sa_config`."""

    def __init__(self, config: TextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks, D, quant = get_tensor_model_parallel_world_size(), config.head_dim, vllm_config.quant_config
        self.heads = config.num_attention_heads // ranks
        self.kv_heads = max(1, config.num_key_value_heads // ranks)
        self.head_dim, self.eps = D, config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, D, config.num_attention_heads, config.num_key_value_heads, bias=config.attention_bias,
            quant_config=quant, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * D, config.hidden_size, bias=config.attention_bias, quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.q_norm, self.k_norm = HeadNorm(D, self.eps), HeadNorm(D, self.eps)
        self.attn: SparseAttention | Attention
        if config.sparse is not None:
            self.sa_indexer = Indexer(config)
            self.attn = SparseAttention(config, self.kv_heads, prefix)
        else:
            self.attn = Attention(
                self.heads, D, D**-0.5, self.kv_heads, cache_config=vllm_config.cache_config, quant_config=quant,
                prefix=f"{prefix}.attn",
            )  # fmt: skip

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """[T, d] -> [T, d]."""
        qkv, _ = self.qkv_proj(x)
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(widths, dim=-1))
        q = norm_rotate(q, self.q_norm.weight, self.eps, rope.cos, rope.sin)
        k = norm_rotate(k, self.k_norm.weight, self.eps, rope.cos, rope.sin)
        if isinstance(self.attn, SparseAttention):
            attended = self.attn(q, k, v, self.sa_indexer(x, rope.indexer_cos, rope.indexer_sin)).flatten(1)
        else:
            attended = self.attn(q.flatten(1), k.flatten(1), v.flatten(1))
        return self.o_proj(attended)[0]


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP or experts, both of vLLM."""

    def __init__(self, config: TextConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config, vllm_config, f"{prefix}.self_attn")
        if config.is_moe_layer(layer):
            # "Transposed" are experts as the official files hold them: x @ W.
            self.mlp: nn.Module = Qwen3MoeSparseMoeBlock(
                vllm_config, prefix=f"{prefix}.mlp", is_fused_checkpoint_transposed=True
            )
        else:
            self.mlp = Qwen3MoeMLP(
                config.hidden_size, config.intermediate_size, config.hidden_act,
                quant_config=vllm_config.quant_config, prefix=f"{prefix}.mlp",
            )  # fmt: skip
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, rope: Rope) -> tuple[Tensor, Tensor]:
        """Output of the layer before it [T, d] and the residual stream without it -> the same of this layer."""
        if residual is None:
            normed, residual = self.input_layernorm(x), x
        else:
            normed, residual = self.input_layernorm(x, residual)
        normed, residual = self.post_attention_layernorm(self.self_attn(normed, rope), residual)
        return self.mlp(normed), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class Decoder(nn.Module):
    """Token embeddings, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config.keye.text
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )  # fmt: skip
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config.head_dim, config.rope_theta), persistent=False)
        if config.sparse is not None:
            dim, theta = config.sparse.indexer_head_dim, float(int(config.rope_theta))
            self.indexer_inv_freq: Tensor
            self.register_buffer("indexer_inv_freq", inverse_frequencies(dim, theta), persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, d]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids [T] or embeddings [T, d], positions int [3, T] -> normalised hidden states [T, d]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rope, residual = self.rope(positions), None
        for layer in self.layers:
            x, residual = layer(x, residual, rope)
        return self.norm(x, residual)[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Official tensors to where vLLM's layers have them."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=_MERGED)

    def rope(self, positions: Tensor) -> Rope:
        """Rotary angles of the attention and, in sparse models, of the indexer."""
        cos, sin = rope_angles(positions, self.inv_freq, self.config.mrope_section)
        if self.config.sparse is None:
            return Rope(cos, sin, None, None)
        index = rope_angles(positions, self.indexer_inv_freq, self.config.indexer_mrope_section())
        return Rope(cos, sin, *index)
