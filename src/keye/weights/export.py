"""A checkpoint folder as GGUF files: its language model, and its vision part (mmproj).

The architecture is `keye-vl2` for 2.0, `qwen3` for the text of 1.5 and Preview, which is Qwen3's, and `deepseek2` for
671B. As text alone 2.0 is `qwen3moe`: without its indexer it is a model that every llama.cpp runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from keye.config import architecture_name, read_json, read_special_tokens
from keye.releases import V2, V671B, releases_by_architecture
from keye.weights.coded import open_plain
from keye.weights.gguf.convert import Conversion, plan_conversion, write_conversion
from keye.weights.gguf.metadata import FILE_KEY, FILES, KEYE2, text_metadata, vision_metadata
from keye.weights.gguf.mixes import TEXT_TYPES, VISION_TYPES
from keye.weights.gguf.names import Sizes
from keye.weights.gguf.reader import GGUFError, Value, read_gguf
from keye.weights.gguf.tokens import token_metadata
from keye.weights.names import is_draft
from keye.weights.source import TensorSource

#: What files say of themselves under `general.quantized_by`.
WRITER: Final = "keye"
_TOKEN_IDS: Final = {"eos": "eos_token_id", "padding": "pad_token_id", "bos": "bos_token_id"}


def export_text(
    folder: Path, path: Path, file_type: str, *, name: str = "Keye-VL", text_only: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes the language model of a checkpoint as `file_type`, one of `TEXT_TYPES`. `text_only` writes 2.0 without its
    indexer. `KeyeError` with one sentence where it cannot; see `write_conversion`."""
    raw = read_json(folder / "config.json")
    sources = open_plain(folder)
    conversion = plan_text(raw, sources, file_type, text_only=text_only)
    values = {**_general("model", _architecture(raw, text_only), name), **_text_values(folder, raw, text_only)}
    write_conversion(path, conversion, values, on_progress, fingerprint=_fingerprint(sources))


def export_vision(
    folder: Path, path: Path, file_type: str, *, name: str = "Keye-VL",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes the vision tower and projector as `file_type`, one of `VISION_TYPES`; else as `export_text`."""
    raw = read_json(folder / "config.json")
    sources = open_plain(folder)
    conversion = plan_vision(sources, file_type)
    if not conversion.recipes:
        raise GGUFError(f"{folder} has no vision tower; leave --mmproj out")
    preprocessor = _read(folder, "preprocessor_config.json")
    release = releases_by_architecture()[architecture_name(raw)]
    values = {**_general("mmproj", "clip", name), **vision_metadata(raw, preprocessor, release)}
    write_conversion(path, conversion, values, on_progress, fingerprint=_fingerprint(sources))


def plan_text(
    raw: Mapping[str, Any], sources: Mapping[str, TensorSource], file_type: str, *, text_only: bool = False
) -> Conversion:
    """What becomes of the tensors of a language model whose parsed config.json is `raw`."""
    if file_type not in TEXT_TYPES:
        raise GGUFError(f"the type {file_type} cannot be written; choose one of {', '.join(TEXT_TYPES)}")
    release = releases_by_architecture()[architecture_name(raw)]
    if text_only and release is not V2:
        raise GGUFError(f"--text-only concerns 2.0, whose indexer it leaves out; the text of {release.name} has none")
    layers, drafts = raw["num_hidden_layers"], raw.get("num_nextn_predict_layers") or 0
    sources = {name: source for name, source in sources.items() if not is_draft(name, layers, drafts)}
    experts = raw.get("n_routed_experts" if release is V671B else "num_experts") or 0
    return plan_conversion(sources, "text", file_type, _sizes(raw), layers=layers,
                           experts=experts, indexer=not text_only)  # fmt: skip


def plan_vision(sources: Mapping[str, TensorSource], file_type: str) -> Conversion:
    """What becomes of the tensors of a vision tower and projector."""
    if file_type not in VISION_TYPES:
        raise GGUFError(f"a vision part cannot be written as {file_type}; choose one of {', '.join(VISION_TYPES)}")
    return plan_conversion(sources, "vision", file_type, Sizes(), layers=0, experts=0)


def _sizes(raw: Mapping[str, Any]) -> Sizes:
    sparse = raw.get("sa_config") or {}
    if releases_by_architecture()[architecture_name(raw)] is V671B:
        return Sizes(heads=raw["num_attention_heads"], nope_dim=raw["qk_nope_head_dim"], value_dim=raw["v_head_dim"])
    return Sizes(sparse.get("indexer_num_heads", 0), sparse.get("indexer_head_dim", 0))


def _architecture(raw: Mapping[str, Any], text_only: bool) -> str:
    release = releases_by_architecture()[architecture_name(raw)]
    if release is V671B:
        return "deepseek2"
    if release is V2:
        return "qwen3moe" if text_only else KEYE2
    return "qwen3"


def _general(kind: str, architecture: str, name: str) -> dict[str, Value]:
    return {
        "general.type": kind, "general.architecture": architecture, "general.name": name,
        "general.quantized_by": WRITER,
    }  # fmt: skip


def is_own(path: Path) -> bool:
    """Whether a file is a GGUF file that keye wrote."""
    try:
        return read_gguf(path).metadata.get("general.quantized_by") == WRITER
    except GGUFError:
        return False


def _text_values(folder: Path, raw: Mapping[str, Any], text_only: bool) -> dict[str, Value]:
    values = text_metadata(raw, _architecture(raw, text_only))
    tokenizer = _read(folder, "tokenizer.json")
    if tokenizer:
        values |= token_metadata(tokenizer, raw["vocab_size"])
        named = read_special_tokens(folder)
        added = {token.get("content"): token.get("id") for token in tokenizer.get("added_tokens", [])}
        for key, field in _TOKEN_IDS.items():
            index = raw.get(field)
            index = index[0] if isinstance(index, list) and index else index
            if index is None:  # templates write it by name
                index = added.get(named.get(field.removesuffix("_id"), ""))
            if isinstance(index, int):
                values[f"tokenizer.ggml.{key}_token_id"] = index
    if (template := _template(folder)) is not None:
        values["tokenizer.chat_template"] = template
    for name in FILES:
        if (folder / name).is_file():
            values[FILE_KEY + name] = (folder / name).read_text(encoding="utf-8")
    return values


def _template(folder: Path) -> str | None:
    """The chat template of a checkpoint, in whichever file it is."""
    if (jinja := folder / "chat_template.jinja").is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if isinstance(text := _read(folder, name).get("chat_template"), str):
            return text
    return None


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _fingerprint(sources: Mapping[str, TensorSource]) -> str:
    """Changes with the files of a checkpoint."""
    files = sorted({Path(source.place[0]) for source in sources.values()})
    return "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
