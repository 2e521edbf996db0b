"""What plug-ins may import besides the names of `keye` itself: the parts of which another engine builds Keye-VL.

The names here keep their meaning within a minor version (0.2.x); a test holds names and signatures to a committed list.
Everything else in `keye` may move in any release.
"""

from __future__ import annotations

# Conversations to text, special tokens and media in their places.
from keye.chat.foreign_template import CheckpointTemplate, find_template
from keye.chat.messages import Medium, normalize
from keye.chat.template import ChatTemplate, Segment, template_of
from keye.chat.tokenizer import Tokenizer, check_tokenizer

# Checkpoints: local files by name, configuration, rules of a release, names of tensors.
from keye.config import KeyeConfig, TextConfig, load_generation_config, load_processor_config, model_config_from_dict

# Media: options, sources, patches, positions.
from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS, MediumKind
from keye.engine.media import check_medium
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.hub import resolve
from keye.media.pixels.patches import is_array
from keye.media.positions import build_position_ids
from keye.media.processor import MediaItem, Processor
from keye.media.source.fetch import Source, decode_list, fetch_source, parse_list, untrusted

# Networks.
from keye.models.attention import Indexer, IndexerOutput, Rope, cache_rows
from keye.models.layers import RMSNorm
from keye.models.vision import Projector, Visual, encode_vision

# Attention over cached rows.
from keye.ops.backend import Backend, Stretch
from keye.ops.elementwise import norm_rotate
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat, RowKind, RowSpec
from keye.ops.reference import inverse_frequencies, rope_angles
from keye.ops.registry import dense_attention, sparse_attention
from keye.releases import Release
from keye.weights.names import IGNORED, INDEXER

__all__ = [
    "IGNORED", "IMAGE_OPTIONS", "INDEXER", "KV_BLOCK", "VIDEO_OPTIONS", "Backend", "BlockRows",
    "ChatTemplate", "CheckpointTemplate", "ContextBudget", "Indexer", "IndexerOutput", "KeyeConfig", "MediaItem",
    "Medium", "MediumKind", "Processor", "Projector", "Prompt", "PromptBuilder", "RMSNorm", "Release", "Rope",
    "RowFormat", "RowKind",
    "RowSpec", "Segment", "Source", "Stretch", "TextConfig", "Tokenizer", "Visual", "build_position_ids",
    "cache_rows", "check_medium", "check_tokenizer", "decode_list", "dense_attention", "encode_vision", "fetch_source",
    "find_template", "inverse_frequencies", "is_array", "load_generation_config", "load_processor_config",
    "model_config_from_dict", "norm_rotate", "normalize", "parse_list", "resolve", "rope_angles", "sparse_attention",
    "template_of", "untrusted",
]  # fmt: skip
