"""What the plug-in relies on in vLLM, by name: after an update of vLLM, a failure here says what moved."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

#: Functions and methods that the plug-in calls or overrides, with the parameters that it relies on.
SIGNATURES = {
    "vllm.config:get_current_vllm_config": [],
    "vllm.forward_context:get_forward_context": [],
    "vllm.distributed:get_tensor_model_parallel_world_size": [],
    "vllm.utils.torch_utils:direct_register_custom_op": ["op_name", "op_func", "mutates_args", "fake_impl"],
    "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype": ["kv_cache_dtype", "model_config"],
    "vllm.v1.attention.backends.registry:register_backend": ["backend", "class_path"],
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": [
        "self", "common_prefix_len", "common_attn_metadata", "fast_build"],
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": [
        "self", "kv_cache_spec", "layer_names", "vllm_config", "device"],
    "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes": ["kv_cache_spec"],
    "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts": [],
    "vllm.v1.attention.backend:AttentionBackend.supports_kv_connector": [],
    "vllm.v1.attention.backend:AttentionBackend.is_sparse": [],
    "vllm.v1.kv_cache_interface:is_quantized_kv_cache": ["kv_cache_dtype"],
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.bind_kv_cache": ["self", "kv_cache"],
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend": ["self"],
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec": ["self", "vllm_config"],
    "vllm.model_executor.layers.attention:Attention.__init__": [
        "self", "num_heads", "head_size", "scale", "num_kv_heads", "cache_config", "quant_config", "prefix"],
    "vllm.model_executor.layers.layernorm:RMSNorm.__init__": ["self", "hidden_size", "eps"],
    "vllm.model_executor.layers.linear:QKVParallelLinear.__init__": [
        "self", "hidden_size", "head_size", "total_num_heads", "total_num_kv_heads", "bias", "quant_config", "prefix"],
    "vllm.model_executor.layers.linear:RowParallelLinear.__init__": [
        "self", "input_size", "output_size", "bias", "quant_config", "prefix"],
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.tie_weights": ["self", "embed_tokens"],
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeSparseMoeBlock.__init__": [
        "self", "vllm_config", "prefix", "is_fused_checkpoint_transposed"],
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeMLP.__init__": [
        "self", "hidden_size", "intermediate_size", "hidden_act", "quant_config", "prefix"],
    "vllm.model_executor.models.utils:AutoWeightsLoader.load_weights": ["self", "weights", "mapper"],
    "vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions": [
        "self", "input_tokens", "mm_features"],
    "vllm.model_executor.models.interfaces:SupportsMultiModal._mark_tower_model": ["self", "vllm_config", "modalities"],
    "vllm.model_executor.models.interfaces:SupportsMultiModal._mark_language_model": ["self", "vllm_config"],
    "vllm.model_executor.models.interfaces:SupportsMultiModal.get_placeholder_str": ["modality", "i"],
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": ["vllm_config"],
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config": ["model_config"],
    "vllm.multimodal.parse:MultiModalDataParser._get_subparsers": ["self"],
    "vllm.multimodal.parse:ProcessorBatchItems.get_item_for_hash": ["self", "index"],
    "vllm.multimodal.processing:BaseMultiModalProcessor.apply": ["self", "inputs", "timing_ctx"],
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_hf_mm_inputs": ["self", "mm_items", "hf_kwargs"],
    "vllm.multimodal.processing:BaseMultiModalProcessor._call_hf_processor": ["self", "hf_data", "hf_kwargs"],
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_mm_fields_config": [
        "self", "hf_inputs", "hf_processor_mm_kwargs"],
    "vllm.multimodal.processing:BaseMultiModalProcessor._get_prompt_updates": [
        "self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
    "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item": ["self", "seq_len", "mm_counts"],
    "vllm.multimodal.processing:BaseProcessingInfo.get_supported_mm_limits": ["self"],
    "vllm.multimodal.processing:BaseProcessingInfo.get_data_parser": ["self"],
    "vllm.multimodal.processing:BaseDummyInputsBuilder.get_dummy_mm_data": [
        "self", "seq_len", "mm_counts", "mm_options"],
    "vllm.multimodal.processing.context:InputProcessingContext.get_merged_mm_kwargs": ["self", "kwargs"],
    "vllm.multimodal.processing:PromptUpdateDetails.select_token_id": ["seq", "embed_token_id"],
    "vllm.multimodal.inputs:MultiModalFieldConfig.flat_from_sizes": ["modality", "size_per_item", "keep_on_cpu"],
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": ["modality", "keep_on_cpu"],
    "vllm.multimodal.video:VideoLoaderRegistry.register": ["self", "name", "video_processor"],
    "vllm.renderers.hf:HfRenderer.render_messages": ["self", "messages", "params"],
    "vllm.renderers.hf:HfRenderer.render_messages_async": ["self", "messages", "params"],
    "vllm.renderers.registry:RendererRegistry.register": ["self", "renderer_mode", "module", "class_name"],
    "vllm.tokenizers.registry:_TokenizerRegistry.register": ["self", "tokenizer_mode", "module", "class_name"],
    "vllm.renderers.chat_utils:parse_chat_messages": [
        "messages", "model_config", "content_format", "media_io_kwargs", "mm_processor_kwargs"],
    "vllm.renderers.chat_utils:parse_chat_messages_async": [
        "messages", "model_config", "content_format", "media_io_kwargs", "mm_processor_kwargs"],
}  # fmt: skip
#: Data that the plug-in reads or makes, with its fields.
FIELDS = {
    "vllm.v1.attention.backend:CommonAttentionMetadata": [
        "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs", "num_actual_tokens",
        "block_table_tensor", "slot_mapping"],
    "vllm.v1.kv_cache_interface:FullAttentionSpec": [
        "block_size", "num_kv_heads", "head_size", "dtype", "num_head_slots", "state_content_bytes"],
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": ["block_size", "num_kv_heads", "head_size", "dtype", "cache_role"],
    "vllm.multimodal.inputs:MultiModalFeatureSpec": ["data", "modality", "mm_position"],
    "vllm.multimodal.inputs:PlaceholderRange": ["offset", "length", "is_embed"],
    "vllm.multimodal.media:MediaWithBytes": ["media", "original_bytes"],
    "vllm.multimodal.processing:ProcessorInputs": ["mm_data_items", "hf_processor_mm_kwargs"],
    "vllm.model_executor.models.utils:WeightsMapper": ["orig_to_new_stacked"],
    "vllm.renderers.params:ChatParams": [
        "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs"],
    "vllm.config:CacheConfig": ["block_size", "cache_dtype"],
    "vllm.config:ParallelConfig": [
        "enable_expert_parallel", "decode_context_parallel_size", "prefill_context_parallel_size"],
    "vllm.config:CompilationConfig": ["splitting_ops", "static_forward_context"],
    "vllm.config:VllmConfig": ["speculative_config", "kv_transfer_config", "quant_config"],
    "vllm.forward_context:ForwardContext": ["attn_metadata", "no_compile_layers"],
}  # fmt: skip
#: Names that have to be there, as what they are.
VALUES = {
    "vllm:__version__": str,
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP": dict,
    "vllm.renderers.registry:RENDERER_REGISTRY.renderers": dict,
    "vllm.multimodal.video:VIDEO_LOADER_REGISTRY.processor2backend": dict,
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.__members__": object,
    "vllm.v1.kv_cache_layout:KVCacheLayout.LBHNC": object,
    "vllm.v1.kv_cache_interface:SparseCacheRole.INDEXER": str,
    "vllm.config:CompilationConfig._attention_ops": list,
    "vllm.multimodal:MULTIMODAL_REGISTRY": object,
    "vllm.compilation.decorators:support_torch_compile": object,
    "vllm.tokenizers.hf:CachedHfTokenizer": type,
    "transformers.models.auto.video_processing_auto:VIDEO_PROCESSOR_MAPPING_NAMES": dict,
}


def find(name: str) -> Any:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = list(inspect.signature(find(name)).parameters)
    assert [parameter for parameter in parameters if parameter in SIGNATURES[name]] == SIGNATURES[name], parameters


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(find(name))}
    assert not set(FIELDS[name]) - fields


@pytest.mark.parametrize("name", VALUES)
def test_value(name: str) -> None:
    assert isinstance(find(name), VALUES[name])


def test_what_vllm_adds_to_a_request() -> None:
    """Unknown `chat_template_kwargs` are refused, so those that vLLM adds by itself must be known."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from keye_vllm.prompts import SETTINGS, VLLM_SETTINGS

    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}])
    added = request.build_chat_params(None, "auto").chat_template_kwargs
    assert not {name for name, value in added.items() if value is not None} - SETTINGS - VLLM_SETTINGS


def test_parts_of_messages_keep_their_options() -> None:
    """Options beside a medium and inside its object come through vLLM's check of a request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    part = {"type": "video_url", "video_url": {"url": "u", "preprocess_kwargs": {"fps": 1}}, "max_frames": 3}
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": [part]}])
    assert dict(request.messages[0])["content"] == [part]
