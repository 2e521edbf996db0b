"""What is wrong with a configuration: fields of a wrong kind, and fields that contradict one another.

Every function yields sentences, each naming a field and what it must be; `keye.config` raises the first. Later checks
may rely on earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from keye.errors import is_number, is_whole

if TYPE_CHECKING:
    from keye.config import GenerationConfig, KeyeConfig, ProcessorConfig, VisionConfig

#: Names of the rotary embedding that keye implements. Others stretch the context by changing the frequencies.
ROPE_TYPES = (None, "mrope", "default")
_FLAGS = ("attention_bias", "tie_word_embeddings", "norm_topk_prob")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def text_field_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Of a parsed config.json: the decoder's fields that have the wrong kind or ask for what is not implemented."""
    for name in ("rope_theta", "rms_norm_eps"):
        value = raw.get(name)
        if value is not None and not (is_number(value) and value > 0):
            yield f"config.json has {name} {value!r}; it must be a number above 0"
    for name in _FLAGS:
        if not isinstance(raw.get(name), bool | None):
            yield f"config.json has {name} {raw[name]!r}; it must be true or false"
    layers = raw.get("mlp_only_layers")
    if layers is not None and not (isinstance(layers, list | tuple) and all(map(is_whole, layers))):
        yield f"config.json has mlp_only_layers {layers!r}; it must be a list of layer numbers"
    for name in ("eos_token_id", "pad_token_id"):
        value = raw.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list | tuple) else (value,)
        if value is not None and not all(is_whole(i) and i >= 0 for i in ids):
            yield f"config.json has {name} {value!r}; it must be a token id"
    if not isinstance(raw.get("sa_config"), Mapping | None):
        yield f"config.json has sa_config {raw['sa_config']!r}; it must be an object"
    yield from _rope_problems(raw)
    if raw.get("use_sliding_window"):
        yield "use_sliding_window is true; no Keye model uses it and it is not supported"


def _rope_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping) or "mrope_section" not in scaling:
        yield "config.json lacks rope_scaling.mrope_section, the three M-RoPE sections of the decoder"
    section = scaling["mrope_section"]
    if not isinstance(section, list | tuple) or len(section) != 3 or not all(map(is_whole, section)):
        yield f"rope_scaling.mrope_section is {section!r}; it must be three whole numbers"
    if scaling.get("mrope_interleaved"):
        yield "rope_scaling.mrope_interleaved is true; only the contiguous M-RoPE layout is supported"
    for name in ("type", "rope_type"):
        if scaling.get(name) not in ROPE_TYPES:
            yield f"rope_scaling.{name} is {scaling[name]!r}; only mrope and default are implemented"
    if scaling.get("factor") not in (None, 1):
        yield f"rope_scaling.factor is {scaling['factor']!r}, but scaled positions are not implemented; remove it"


def vision_problems(vision: VisionConfig) -> Iterator[str]:
    """Of the vision tower."""
    for name in ("rope_theta", "layer_norm_eps"):
        value = getattr(vision, name)
        if not (is_number(value) and value > 0):
            yield f"vision_config has {name} {value!r}; it must be a number above 0"
    if vision.hidden_size % vision.num_attention_heads or vision.head_dim % 4:
        yield f"vision hidden_size {vision.hidden_size} must be {vision.num_attention_heads} heads of a multiple of 4"
    if vision.hidden_act != "gelu_pytorch_tanh":
        yield f"vision hidden_act {vision.hidden_act!r} is not supported"
    if vision.image_size < vision.patch_size:
        yield f"vision image_size {vision.image_size} holds no patch of {vision.patch_size} pixels"


def model_problems(config: KeyeConfig) -> Iterator[str]:
    """Contradictions between the fields of a whole model."""
    text = config.text
    if sum(text.mrope_section) * 2 != text.head_dim or min(text.mrope_section) < 0:
        yield f"mrope_section {list(text.mrope_section)} must sum to head_dim/2 = {text.head_dim // 2}"
    if text.num_attention_heads % text.num_key_value_heads:
        yield (f"num_attention_heads {text.num_attention_heads} is not a multiple of "
               f"num_key_value_heads {text.num_key_value_heads}")  # fmt: skip
    if text.num_experts > 0 and not 0 < text.num_experts_per_tok <= text.num_experts:
        yield f"num_experts_per_tok {text.num_experts_per_tok} must lie between 1 and num_experts {text.num_experts}"
    if text.num_experts > 0 and text.moe_intermediate_size <= 0:
        yield "num_experts needs moe_intermediate_size"
    if text.hidden_act != "silu":
        yield f"hidden_act {text.hidden_act!r} is not supported; Keye decoders use silu"
    if any(not 0 <= i < text.num_hidden_layers for i in text.mlp_only_layers):
        yield f"mlp_only_layers {list(text.mlp_only_layers)} names layers outside 0..{text.num_hidden_layers - 1}"
    if text.sparse is not None:
        dim = text.sparse.indexer_head_dim
        if dim & (dim - 1):
            yield f"sa_config.indexer_head_dim {dim} must be a power of two"
        if sum(text.indexer_mrope_section()) * 2 != dim:
            yield f"mrope_section {list(text.mrope_section)} does not scale to sa_config.indexer_head_dim {dim}"
        if text.sparse.indexer_num_kv_heads != 1:
            yield "sa_config.indexer_num_kv_heads must be 1"
    yield from _token_problems(config)


def _token_problems(config: KeyeConfig) -> Iterator[str]:
    names: dict[int, str] = {}
    for name in _TOKEN_IDS:
        index = getattr(config, name)
        if index >= config.text.vocab_size:
            yield f"{name} {index} is beyond the vocabulary: vocab_size is {config.text.vocab_size}"
        if index in names:
            yield f"{names[index]} and {name} are both {index}; each needs a token of its own"
        names[index] = name


def processor_problems(config: ProcessorConfig) -> Iterator[str]:
    """Of how media become tokens."""
    for name in (
        "patch_size", "merge_size", "image_min_tokens", "image_max_tokens", "video_min_tokens", "video_max_tokens",
        "video_total_tokens", "frame_factor", "min_frames", "max_frames", "processor_min_pixels",
        "processor_max_pixels",
    ):  # fmt: skip
        value = getattr(config, name)
        optional = name in ("max_frames", "processor_min_pixels", "processor_max_pixels")
        if not (is_whole(value) and value > 0) and not (value is None and optional):
            yield f"the processor's {name} is {value!r}; it must be a whole number of at least 1"
    for name in ("image_mean", "image_std"):
        value = getattr(config, name)
        fine = isinstance(value, list | tuple) and len(value) == 3 and all(map(is_number, value))
        if not fine:
            yield f"the processor's {name} is {value!r}; it must be three numbers"
        if name == "image_std" and min(value) <= 0:
            yield f"the processor's image_std is {value!r}; all of it must be above 0"
    for name in ("fps", "fast_ratio"):
        value = getattr(config, name)
        if not (is_number(value) and value > 0):
            yield f"the processor's {name} is {value!r}; it must be a number above 0"
    if not (is_number(config.min_frame_similarity) and 0 <= config.min_frame_similarity <= 1):
        yield f"the processor's min_frame_similarity is {config.min_frame_similarity!r}; it must lie between 0 and 1"
    yield from _flag_problems(config, "adaptive_budget", "the processor has")
    if config.video_min_tokens > config.video_max_tokens or config.image_min_tokens > config.image_max_tokens:
        yield "the processor's minimum of tokens is above its maximum; swap min_tokens and max_tokens"
    yield from _format_problems("frame_text", config.frame_text, seconds=0.0)


def patch_problems(processor: ProcessorConfig, raw: Mapping[str, Any]) -> Iterator[str]:
    """Between a processor and the vision tower of a parsed config.json."""
    vision = raw.get("vision_config")
    if not isinstance(vision, Mapping):
        return
    for ours, theirs, default in (("patch_size", "patch_size", 14), ("merge_size", "spatial_merge_size", 2)):
        actual, wanted = getattr(processor, ours), vision.get(theirs) or default
        if actual != wanted:
            yield f"the processor makes {ours} {actual} but vision_config.{theirs} is {wanted}; they must agree"


def generation_problems(config: GenerationConfig) -> Iterator[str]:
    """Of how a model wants to be sampled."""
    where = "generation_config.json has"
    yield from _flag_problems(config, "do_sample", where)
    for name, least in (("top_k", 0), ("max_new_tokens", 1)):
        value = getattr(config, name)
        if value is not None and not (is_whole(value) and value >= least):
            yield f"{where} {name} {value!r}; it must be a whole number of at least {least}"
    for name, may_be_zero, most in (
        ("temperature", True, 100),
        ("top_p", False, 1),
        ("repetition_penalty", False, 100),
    ):
        value = getattr(config, name)
        if value is not None and not (is_number(value) and 0 <= value <= most and (value or may_be_zero)):
            low = "0 or more" if may_be_zero else "above 0"
            yield f"{where} {name} {value!r}; it must be a number {low} and at most {most}"
    if not all(is_whole(i) and i >= 0 for i in config.eos_token_ids):
        yield f"{where} eos_token_id {list(config.eos_token_ids)!r}; it must be token ids"
    system: Any = config.default_system
    if not isinstance(system, str | None):
        yield f"{where} default_system {system!r}; it must be a text"
    examples: Any = config.examples
    if not (
        isinstance(examples, list | tuple) and all(isinstance(example, str) and example.strip() for example in examples)
    ):
        yield f"{where} examples {examples!r}; it must be a list of questions"
    yield from _format_problems("ground_prompt", config.ground_prompt, event="", article="")


def _flag_problems(config: object, name: str, where: str) -> Iterator[str]:
    value = getattr(config, name)
    if not isinstance(value, bool):
        yield f"{where} {name} {value!r}; it must be true or false"


def _format_problems(name: str, text: object, **fields: Any) -> Iterator[str]:
    """A text with {fields} that are filled in later."""
    if not isinstance(text, str):
        yield f"{name} is {text!r}; it must be a text"
        return
    try:
        text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        listed = ", ".join("{" + field + "}" for field in fields)
        yield f"{name} {text!r} may only use the field {listed}: {error}"
