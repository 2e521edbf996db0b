"""A video read once and kept in a file: the prompt up to the end of the video is computed, and questions continue it.

`write_video_index` and `open_video_index` turn a prompt into the facts of the header of an `IndexFile` and back, and
hold file and model together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import torch

from keye.cache.checksums import damage_error
from keye.cache.fingerprint import Fingerprint
from keye.cache.index_file import IndexFile, check_index_disk, open_mapped, read_index_file, write_index_file
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout
from keye.chat.messages import Medium, Message
from keye.config import KeyeConfig
from keye.engine.engine import Engine
from keye.engine.media import VideoIndex
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.engine.request import Progress
from keye.engine.runtime import Runtime
from keye.errors import KeyeError, KeyeWarning
from keye.media.processor import Piece, VisualSpan, count_visual_tokens
from keye.media.source.fetch import Source, is_index
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode, cache_rows
from keye.models.keye import visual_mask
from keye.ops.kv_blocks import RowSpec
from keye.version import __version__


@dataclass(frozen=True)
class IndexInfo:
    """An index that was written: `tokens` stored, `media_tokens` of them visual, `bytes` of the file, the number format
    of keys and values, the plan of the video, and wall time by phase."""

    path: Path
    tokens: int
    media_tokens: int
    bytes: int
    kv: str
    plan: Mapping[str, Any]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "path": str(self.path)}


def write_video_index(
    engine: Engine, medium: Medium, path: Path, mode: AttentionMode, *, adapter: Adapter | None = None,
    seconds: float | None = None, on_progress: Callable[[Progress], None] | None = None,
    check: Callable[[], None] | None = None,
) -> IndexInfo:  # fmt: skip
    """Computes the prompt up to the end of a video as a request, and writes what is stored of it. `on_progress` and
    `check` may raise to end the work, which may take `seconds` at most. `KeyeError`, before anything is computed, for a
    video that does not fit the context, the memory or the disk."""
    begin = time.perf_counter()
    if isinstance(medium.source, Source) and is_index(medium.source):
        raise KeyeError(f"{medium.source.name} is an index already: give the video itself")
    owner = engine.runtime
    builder, model = owner.prompts, owner.model
    segments = builder.render([Message("user", (medium, "."))], template=owner.template)
    end = next(i for i, segment in enumerate(segments) if segment.value is medium)
    text = model.config.text if mode == "sparse" else model.config.without_indexer().text
    layout = owner.kv.layout(cache_rows(text), model.dtype)
    budget, salt = ContextBudget(text.max_position_embeddings, 1), b"" if adapter is None else adapter.vision_salt
    prompt = builder.lay_out(segments[: end + 1], budget=budget, stream=True, salt=salt)
    check_index_disk(path, layout, prompt.length)
    prepared = time.perf_counter()
    # A store of its own, since the rows of an index are those of its mode and are freed together.
    empty = KVCache(layout.layers, owner.kv.store(layout, model.device, owner.ledger))
    sequence, finished = engine.prefill(
        replace(prompt, past=empty), attention=mode, adapter=adapter, seconds=seconds, on_progress=on_progress,
        check=check,
    )  # fmt: skip
    prefilled = time.perf_counter()
    about = _about(owner, builder, prompt, medium, mode)
    if adapter is not None:
        about["adapter"] = adapter.fingerprint
    about["video"]["plan"] = plan = _noted(prompt.plans[0], finished.notes)
    write_index_file(path, sequence, torch.cat((prompt.token_ids[None], prompt.position_ids)), about)
    sequence.free()
    done = time.perf_counter()
    times = {"media": prepared - begin, "prefill": prefilled - prepared, "write": done - prefilled}
    return IndexInfo(
        path, prompt.length, prompt.visual_tokens, path.stat().st_size, layout.kind, plan,
        {name: round(value, 4) for name, value in times.items()},
    )  # fmt: skip


def _about(
    owner: Runtime, builder: PromptBuilder, prompt: Prompt, medium: Medium, mode: AttentionMode
) -> dict[str, Any]:
    """The header of an index, storage excepted."""
    (item,) = prompt.media
    return {
        "keye": __version__, "model": asdict(owner.fingerprint), "attention": mode,
        "next_position": prompt.next_position, "start": prompt.token_ids.shape[0] - len(builder.piece_ids(item.pieces)),
        "video": {
            "sha256": _file_hash(medium.source), "plan": prompt.plans[0], "timestamps": list(item.timestamps),
            "options": {name: value for name, value in medium.options.items() if value is not None},
            "pieces": [piece.tokens if isinstance(piece, VisualSpan) else piece for piece in item.pieces],
        },
    }  # fmt: skip


def _noted(plan: Mapping[str, Any], warnings: Sequence[KeyeWarning]) -> Mapping[str, Any]:
    """A plan with what was tolerated of the video when its frames were read."""
    if not warnings:
        return plan
    notes = (str(warning).removeprefix(f"{plan['name']}: ") for warning in warnings)
    return {**plan, "notes": [*plan.get("notes", ()), *notes]}


def _file_hash(source: Any) -> str | None:
    """SHA-256 of a video file; None for pictures in memory."""
    if not isinstance(source, Source):
        return None
    with source.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a BinaryIO


def open_video_index(owner: Runtime, source: Source) -> VideoIndex:
    """An index as the beginning of prompts of a model. `KeyeError` where the file is damaged, or is not of this model.

    Its blocks are read only and shared by all that continue it; what they add goes to a store of the same formats in
    the model's own tier.
    """
    if source.path is None:
        raise KeyeError(f"{source.name} is an index, which is mapped from its file: give its path")
    file, mapped, check = open_mapped(source.path)
    facts = _Facts.read(file)
    check_same_model(source.path, facts.model, owner.fingerprint)
    if "native_fps" in facts.plan and "start_offset" not in facts.plan:
        raise KeyeError(f"{source.path} was made by an older keye, whose times counted from the first picture and not "
                        "from the start of the file: index the video again")  # fmt: skip
    check_layout(source.path, file.layout, owner.config)
    _check_tokens(file, facts, owner.config)
    rows, near, device = dict(file.rows(mapped)), 0, owner.model.device
    for name in file.layout.scanned if device.type != "cpu" else ():
        for layer in range(file.layout.layers):
            check.compare(name, layer)
        if check.damage is not None:
            raise check.damage
        near, rows[name] = near + rows[name].nbytes, rows[name].to(device)
    store = owner.kv.store(file.layout, device, owner.ledger)
    blocks = store.adopt(rows, file.blocks, near)
    cache = KVCache.of_blocks(store, blocks, file.length, check)
    return VideoIndex(
        source.name, file.tokens[0], file.tokens[1:], facts.next_position, facts.start, facts.pieces, facts.timestamps,
        facts.plan, facts.attention, cache, facts.adapter,
    )  # fmt: skip


def check_same_model(path: Path, theirs: Fingerprint, ours: Fingerprint) -> None:
    """`KeyeError` that says in what the model of an index differs from another."""
    again = "or index the video again"
    if theirs.config != ours.config:
        raise KeyeError(f"{path} is an index of the model {theirs.name}, not of {ours.name} as it is configured here: "
                        f"ask with that model, {again}")  # fmt: skip
    if theirs.dtype != ours.dtype:
        raise KeyeError(f"{path} was computed in {theirs.dtype}, but the model is loaded in {ours.dtype}: load it with "
                        f"dtype {theirs.dtype}, {again}")  # fmt: skip
    if theirs.weights != ours.weights:
        raise KeyeError(f"{path} is an index of the model {theirs.name} with other weights: ask with those, {again}")
    if theirs.processor != ours.processor:
        raise KeyeError(f"{path} was made when {theirs.name} prepared media otherwise: {again.removeprefix('or ')}")


def describe(path: Path) -> dict[str, Any]:
    """What an index holds, from its header, as plain data for `keye inspect`."""
    file = read_index_file(path)
    facts = _Facts.read(file)
    return {
        "index": str(path), "bytes": file.size, "keye": file.about.get("keye"), "model": asdict(facts.model),
        "attention": facts.attention, "tokens": file.length, "visual_tokens": facts.visual_tokens,
        "layers": file.layout.layers, "formats": {name: rows.kind for name, rows in file.layout.rows.items()},
        "bytes_per_token": file.layout.token_bytes, "video": {**facts.video, "pieces": len(facts.pieces)},
    }  # fmt: skip


#: What answers and tables show of a plan.
_PLAN: Final[Mapping[str, Any]] = {
    "name": str, "duration": int | float, "frames": int, "timestamps": list, "visual_tokens": int,
    "start_offset": int | float, "notes": list,
}  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """The header of a file after its storage, checked field by field."""

    model: Fingerprint
    attention: AttentionMode
    next_position: int
    start: int
    video: Mapping[str, Any]
    plan: Mapping[str, Any]
    pieces: tuple[Piece, ...]
    timestamps: tuple[float, ...]
    adapter: str

    @property
    def visual_tokens(self) -> int:
        return count_visual_tokens(self.pieces)

    @classmethod
    def read(cls, file: IndexFile) -> _Facts:
        about = file.about
        names = dict.fromkeys(Fingerprint.__dataclass_fields__, str)
        model, video = _fields(file, about.get("model"), names), about.get("video")
        _fields(file, about, {"attention": str, "next_position": int, "start": int})
        fields = _fields(file, video, {"plan": dict, "options": dict, "pieces": list, "timestamps": list})
        sound = (
            about["attention"] in get_args(AttentionMode)
            and isinstance(about.get("adapter", ""), str)
            and 0 <= about["start"] <= file.length
            and any(type(piece) is int for piece in fields["pieces"])
            and all(
                isinstance(piece, str) or (type(piece) is int and 0 < piece <= file.length)
                for piece in fields["pieces"]
            )
            and all(isinstance(piece, int | float) for piece in fields["timestamps"])
            and all(isinstance(value, _PLAN.get(name, object)) for name, value in fields["plan"].items())
            and all(_is_times(fields["plan"].get(name)) for name in ("timestamps", "label_times", "part"))
        )
        if not sound:
            raise damage_error(file.path, "its header holds values that keye does not write")
        pieces = tuple(piece if isinstance(piece, str) else VisualSpan("video", piece) for piece in fields["pieces"])
        return cls(
            Fingerprint(**{name: model[name] for name in names}), about["attention"], about["next_position"],
            about["start"], fields, fields["plan"], pieces, tuple(map(float, fields["timestamps"])),
            about.get("adapter", ""),
        )  # fmt: skip


def _is_times(value: object) -> bool:
    """Whether a value is a list of seconds, or not there."""
    return value is None or (isinstance(value, list) and all(isinstance(seconds, int | float) for seconds in value))


def _fields(file: IndexFile, value: Any, wanted: Mapping[str, type]) -> Mapping[str, Any]:
    """A part of the header that has these fields."""
    if not isinstance(value, dict) or not all(type(value.get(name)) is kind for name, kind in wanted.items()):
        raise damage_error(file.path, f"its header lacks one of {', '.join(wanted)}")
    return value


def check_layout(path: Path, layout: KVLayout, config: KeyeConfig) -> None:
    """`KeyeError` where stored rows are not those of the model, in whatever format."""
    specs = {
        name: RowSpec(layout.layers, rows.heads, rows.dim, name in layout.scanned) for name, rows in layout.rows.items()
    }
    # An index of dense attention holds no scanned rows.
    ours = {name: spec for name, spec in cache_rows(config.text).items() if name in specs or not spec.scanned}
    if specs != ours:
        raise damage_error(path, "its rows have another shape than those of its model")


def _check_tokens(file: IndexFile, facts: _Facts, config: KeyeConfig) -> None:
    """Ids, positions and placeholders must be possible for the model."""
    ids, most = file.tokens[0], 1 << 31
    visual = int(visual_mask(config, ids).sum())
    good = 0 <= int(ids.min()) and int(ids.max()) < config.text.vocab_size and 0 < facts.next_position < most
    good = good and 0 <= int(file.tokens[1:].min()) and int(file.tokens.max()) < most
    if not good or visual != facts.visual_tokens:
        raise damage_error(file.path, "its tokens are none of its model")
