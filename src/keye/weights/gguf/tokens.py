"""The tokens of a GGUF file as the official `tokenizer.json`, and its chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from keye.weights.gguf.reader import GGUF, GGUFError

#: Types of tokens: control (3) and user-defined (4) ones are found in text before anything else, unused (5) ones fill
#: the table up.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
#: A whole `tokenizer.json`, for tokenizers that llama.cpp has no name for.
JSON_KEY: Final = "tokenizer.huggingface.json"
#: llama.cpp's name of the pre-tokenizer of Qwen2 and Qwen3, and of DeepSeek-V3's.
QWEN, DEEPSEEK = "qwen2", "deepseek-v3"
#: Control tokens that the official tokenizers do not drop from replies, since models write them as marks.
_MARKS: Final = re.compile(
    r"<\|(object_ref|box|quad|point|ocr_text|clip_time|polygon|fast)_(start|end)\|>|<\|fim_(prefix|middle|suffix|pad)\|>|"
    r"<\|repo_name\|>|<\|file_sep\|>|<\|frame\|>|<\|fast_video_pad\|>|</?(think|tool_call|tool_response)>"
)
#: What cuts texts into words, one pattern after another, and whether characters are composed (NFC) before.
_PATTERNS: Final = {
    QWEN: (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
            r"\s+(?!\S)|\s+",
        ),
        True,
    ),
    DEEPSEEK: (
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
            r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
    ),
}
_MAX_TEMPLATE: Final = 1 << 20


def read_tokens(file: GGUF) -> dict[str, int]:
    """Every token of a file with its id; empty for a file without a vocabulary."""
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise GGUFError(f"{file.path} has tokenizer.ggml.tokens that are not texts; convert the model again")
    return {token: index for index, token in enumerate(tokens)}


def read_tokenizer(file: GGUF, vocabulary: int) -> dict[str, Any] | None:
    """The `tokenizer.json` of a file whose table has `vocabulary` rows, None where it has no tokens. `GGUFError` for
    one that keye cannot make."""
    if (complete := file.text(JSON_KEY)) is not None:
        try:
            described = json.loads(complete)
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            raise GGUFError(f"{file.path} has {JSON_KEY} that is not a JSON object; convert the model again")
        return described
    kind, before = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind != "gpt2" or before not in _PATTERNS:
        raise GGUFError(f"{file.path} has a tokenizer of the kind {str(kind)[:40]}/{str(before)[:40]}; keye reads "
                        f"gpt2/{QWEN}, gpt2/{DEEPSEEK} and {JSON_KEY}")  # fmt: skip
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    merges = file.metadata.get("tokenizer.ggml.merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise GGUFError(f"{file.path} has no list of tokens or merges; convert the model again")
    if len(tokens) > vocabulary:
        raise GGUFError(f"{file.path} has {len(tokens)} tokens and a table of {vocabulary} rows; convert it again")
    return _bpe(file, tokens, _types(file, len(tokens)), merges, before)


def _types(file: GGUF, count: int) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != count:
        raise GGUFError(f"{file.path} has another number of token types than tokens; convert the model again")
    return [int(number) for number in types]


def _bpe(file: GGUF, tokens: list[str], types: list[int], merges: list[str], before: str) -> dict[str, Any]:
    vocabulary: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL and not _MARKS.fullmatch(token)
            added.append(_added(index, token, special=special))
        elif kind != UNUSED:
            if token in vocabulary:
                raise GGUFError(f"{file.path} has the token {token[:40]!r} twice; convert the model again")
            vocabulary[token] = index
    for merge in merges:
        first, _, second = merge.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise GGUFError(f"{file.path} merges {merge[:60]!r}, which are not its tokens; convert the model again")
    patterns, composes = _PATTERNS[before]
    bytewise = {"type": "ByteLevel", "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            *({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
              for pattern in patterns),
            {**bytewise, "add_prefix_space": False, "use_regex": False},
        ]},
        "post_processor": None, "decoder": {**bytewise, "add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def _added(index: int, token: str, *, special: bool) -> dict[str, Any]:
    return {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}  # fmt: skip


def read_template(file: GGUF) -> str | None:
    """The chat template of a file, None where it has none."""
    template = file.text("tokenizer.chat_template")
    if template is not None and len(template) > _MAX_TEMPLATE:
        raise GGUFError(
            f"{file.path} has a chat template of {len(template)} characters; at most {_MAX_TEMPLATE} are read"
        )
    return template


def token_metadata(tokenizer: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The metadata of an official `tokenizer.json` for a table of `size` rows: llama.cpp's list of tokens, and the
    file itself too where llama.cpp has no name for its pre-tokenizer. `GGUFError` for ids beyond the table."""
    model = tokenizer["model"]
    ids = [*model["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise GGUFError(f"tokenizer.json has tokens with ids from {min(ids)} to {max(ids)}, the model a table of "
                        f"{size} rows; use the tokenizer.json and the config.json of one release")  # fmt: skip
    tokens, types = [f"[PAD{index}]" for index in range(size)], np.full(size, UNUSED, "<i4")
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for token in tokenizer["added_tokens"]:
        index, content = token["id"], token["content"]
        looks_special = content.startswith("<|") and content.endswith("|>")
        tokens[index], types[index] = content, CONTROL if token["special"] or looks_special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    parts = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers") or []
    own = tuple(part["pattern"].get("Regex") for part in parts if part["type"] == "Split")
    before = next((name for name, (patterns, _) in _PATTERNS.items() if patterns == own), None)
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": before or QWEN, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    if before is None or model.get("ignore_merges"):
        metadata[JSON_KEY] = json.dumps(tokenizer, ensure_ascii=False)
    return metadata
