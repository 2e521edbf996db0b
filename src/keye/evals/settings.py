"""How a task is run: which items, which frames, which sampling; and the questions of a batch that follow from that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keye.batch.manifest import SAMPLING, BadLine, Item
from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.evals.task import EvalItem, Task

#: Longest reply where neither the user nor the task says, in tokens: without and with reasoning.
MAX_TOKENS: Final = 1024
MAX_TOKENS_THINKING: Final = 16384
#: Options that say how many frames are read; one that the user sets replaces all that an item brings.
_RATES: Final = frozenset({"fps", "nframes", "min_frames", "max_frames"})
_TIMES: Final = {"start": "video_start", "end": "video_end"}


@dataclass(frozen=True)
class RunSettings:
    """What a run may choose; an answer counts for these settings alone.

    limit: the first so many items in the order of the data; None for all.
    media: options of videos and images under the names of `keye.config.media`, over those of the items.
    sampling: those of replies (`keye.batch.manifest.SAMPLING`); the temperature is 0 where nothing is said.
    thinking: asks for or against reasoning; None leaves it to the model.
    attention: "sparse" or "dense" of a keye model; None leaves it to the model.
    prompt: settings of the task's prompts, such as subtitles.
    """

    limit: int | None = None
    media: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    attention: str | None = None
    prompt: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise KeyeError(f"limit is {self.limit}; ask at least 1 item")
        if self.attention not in (None, "sparse", "dense"):
            raise KeyeError(f"attention is {self.attention!r}; choose sparse or dense")
        for name, known in (("media", VIDEO_OPTIONS), ("sampling", SAMPLING)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise KeyeError(f"{name} has no option {unknown[0]!r}; options are {', '.join(sorted(known))}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit, "media": dict(self.media), "sampling": dict(self.sampling), "thinking": self.thinking,
            "attention": self.attention, "prompt": dict(self.prompt),
        }  # fmt: skip


def build_lines(
    items: Iterable[EvalItem], settings: RunSettings, folder: Path | None, *, max_tokens: int | None = None
) -> list[Item | BadLine]:
    """The items as lines of a batch, in their order. One whose media are missing becomes a line that gets an error.

    The digest of a line depends on what is asked and how, and on the size of its media, but not on where `folder`, the
    data, lies. `max_tokens` is the task's longest reply."""
    return [_line(item, settings, folder, max_tokens) for item in items]


def _line(item: EvalItem, settings: RunSettings, folder: Path | None, max_tokens: int | None) -> Item | BadLine:
    parts = [_part(part, settings.media) for part in item.content]
    media = tuple(part[part["type"]] for part in parts if part["type"] in ("video", "image"))
    system = [{"role": "system", "content": item.system}] if item.system else []
    body: dict[str, Any] = {
        "messages": [*system, {"role": "user", "content": parts}],
        **_sampling(settings, max_tokens),
    }
    digest = _digest(body, media, folder)
    if lacking := missing_media(item):
        return BadLine(item.id, 0, digest, f"{lacking[0]} is missing; add it to the data")
    return Item(item.id, 0, digest, body, media)


def _part(part: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A content part with the options of the run in it."""
    kind = part["type"]
    if kind not in ("video", "image"):
        return dict(part)
    own = {_TIMES.get(name, name): value for name, value in part.items()}
    known = VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS
    chosen = {name: value for name, value in options.items() if name in known}
    if {"nframes", "video_start"} <= own.keys():  # a stretch with its share of the frames, which the task has counted
        chosen = {name: value for name, value in chosen.items() if name not in _RATES}
    if _RATES & chosen.keys():
        own = {name: value for name, value in own.items() if name not in _RATES}
    return {**own, **chosen}


def _sampling(settings: RunSettings, max_tokens: int | None) -> dict[str, Any]:
    longest = max_tokens or (MAX_TOKENS_THINKING if settings.thinking else MAX_TOKENS)
    values = {"temperature": 0, "max_tokens": longest, **settings.sampling}
    if settings.attention is not None:
        values["attention"] = settings.attention
    if settings.thinking is not None:
        values["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
    return values


def missing_media(item: EvalItem) -> list[str]:
    """Files that an item names and that are not there; addresses are left to the worker that opens them."""
    names = [str(part[part["type"]]) for part in item.content if part["type"] in ("video", "image")]
    return [name for name in names if name.startswith("/") and not Path(name).is_file()]


def _digest(body: Mapping[str, Any], media: Sequence[str], folder: Path | None) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    if folder is not None:
        place = json.dumps(str(folder.absolute()), ensure_ascii=False)[1:-1]
        text = text.replace(place + "/", "")
    sizes = [Path(name).stat().st_size if name.startswith("/") and Path(name).is_file() else None for name in media]
    return hashlib.sha256(json.dumps([text, sizes]).encode()).hexdigest()[:16]


def digest_of(values: Iterable[object]) -> str:
    """A digest of values that JSON can express, in their order."""
    total = hashlib.sha256()
    for value in values:
        total.update(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace"))
        total.update(b"\0")
    return total.hexdigest()[:16]


def digest_prompts(items: Iterable[EvalItem]) -> str:
    """A digest of what is asked; media count by their kind, since their names depend on the machine."""
    return digest_of(
        (item.id, item.system, [part.get("text") if part["type"] == "text" else part["type"] for part in item.content])
        for item in items
    )


def data_folder(task: Task, root: Path) -> Path:
    """Where the data of a task are: the folder in `root` that has its name, its repository's or its family's (mlvu of
    mlvu_dev), whatever their case, else `root`."""
    names = [task.name, task.source.rpartition("/")[2], task.name.partition("_")[0]]
    try:
        folders = {path.name.lower().replace("-", "_"): path for path in root.iterdir() if path.is_dir()}
    except OSError:
        return root
    keys = (name.lower().replace("-", "_") for name in names if name)
    return next((folders[key] for key in keys if key in folders), root)
