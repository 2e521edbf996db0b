"""The configuration of Keye-VL-2.0 as vLLM reads it, and the settings of vLLM that the plug-in can honour."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import CompilationConfig, ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from keye import KeyeError
from keye.spi import KV_BLOCK, KeyeConfig, model_config_from_dict

#: The name under which prompts are written as keye writes them (`--tokenizer-mode`).
TOKENIZER_MODE = "keye"
#: The operation that reads and writes caches; graphs of vLLM are cut around it.
ATTENTION_OP = "keye_dsa"


class KeyeVL2Config(PreTrainedConfig):
    """The official `config.json` with defaults that vLLM's layers ask for.

    A class of its own: importing `keye.hf` would replace the Auto classes of Preview and 1.5, which vLLM's own models
    use.
    """

    model_type = "KeyeVL2"

    def __init__(self, **official: Any) -> None:
        # Kept beside the attributes, since `transformers` renames fields.
        self.official = {name: copy.deepcopy(value) for name, value in official.items() if not name.startswith("_")}
        dtype = self.official.get("dtype")
        if dtype is not None and not isinstance(dtype, str):  # a torch.dtype
            self.official["dtype"] = str(dtype).removeprefix("torch.")
        rope = {"rope_theta": official.pop("rope_theta", None), **(official.pop("rope_scaling", None) or {})}
        rope |= official.pop("rope_parameters", None) or {}
        official.pop("model_type", None)
        super().__init__(**official)
        self.rope_parameters = rope
        for name, default in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("num_experts", 0)):
            if getattr(self, name, None) is None:
                setattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json`."""
        return {**copy.deepcopy(self.official), "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def keye(self) -> KeyeConfig:
        """The checked configuration; what `--hf-overrides` makes of fields of the file counts."""
        return model_config_from_dict({name: getattr(self, name, value) for name, value in self.official.items()})


class Settings(VerifyAndUpdateConfig):
    """What vLLM asks when it puts its configuration together."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Prompts are keye's unless another way was asked for."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Blocks of 64 tokens, plain numbers in them, and graphs that are cut around attention. `KeyeError` for
        settings that sparse attention cannot honour."""
        text = vllm_config.model_config.hf_config.keye.text
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        if text.num_experts and parallel.enable_expert_parallel and current_platform.is_cpu():
            raise KeyeError("vLLM's experts on CPUs compute every expert as their own, and so wrong answers, with "
                            "--enable-expert-parallel; use tensor parallelism alone")  # fmt: skip
        if text.sparse is None:
            return
        if cache.user_specified_block_size and cache.block_size != KV_BLOCK:
            raise KeyeError(f"--block-size is {cache.block_size}: sparse attention has KV blocks of {KV_BLOCK} tokens")
        cache.block_size, cache.user_specified_block_size = KV_BLOCK, True
        if is_quantized_kv_cache(cache.cache_dtype):
            raise KeyeError(f"--kv-cache-dtype is {cache.cache_dtype}: the plug-in stores plain numbers; use auto")
        if vllm_config.speculative_config is not None:
            raise KeyeError("speculative decoding was not tested with sparse attention; leave it out")
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise KeyeError("context parallelism is not supported by sparse attention; use tensor parallelism")
        if vllm_config.kv_transfer_config is not None:
            raise KeyeError(
                "transfer of KV caches was not tested with sparse attention; leave --kv-transfer-config out"
            )
        compilation = vllm_config.compilation_config
        ops = list(CompilationConfig._attention_ops) if compilation.splitting_ops is None else compilation.splitting_ops
        if ops:  # an empty list asks for no cuts
            compilation.splitting_ops = [*ops, f"vllm::{ATTENTION_OP}"]
