"""LLaMA-Factory's `dataset_info.json`: sets by name, the columns and tags that their files use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError, brief, closest, is_whole
from keye.units import MIB

NAME: Final = "dataset_info.json"
_MAX_BYTES: Final = 16 * MIB
_HUBS: Final = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
#: Columns by their name in the registry: ours, and the name that files have unless the registry says otherwise.
_ALPACA: Final = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
}
_SHAREGPT: Final = {"messages": ("messages", "conversations")}
_SHARED: Final = {
    name: (name, None) for name in ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected")
}  # fmt: skip
_TAGS: Final = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ROLES: Final = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
_KNOWN: Final = frozenset({
    "file_name", "file_sha1", "formatting", "ranking", "columns", "tags", "num_samples", "split", "subset", "folder",
    *_HUBS,
})  # fmt: skip

#: Gives the fields of a row our names.
Prepare = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Registered:
    """A set of a registry: its file or folder, what its fields become, and how many of its rows are used."""

    path: Path
    prepare: Prepare
    count: int | None


def read_registry(path: Path) -> dict[str, Mapping[str, Any]] | None:
    """The sets of a registry by name; None where the file is none."""
    file = path / NAME if path.is_dir() else path
    if file.name != NAME or not file.is_file() or file.stat().st_size > _MAX_BYTES:
        return None
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise KeyeError(f"{file} is not valid JSON ({error})") from None
    is_registry = isinstance(value, dict) and any(
        isinstance(entry, dict) and ("file_name" in entry or any(hub in entry for hub in _HUBS))
        for entry in value.values()
    )
    return value if is_registry else None


def find_registered(path: Path, name: str | None) -> Registered:
    """The set `name` of a registry, or its only one."""
    entries = read_registry(path)
    if entries is None:
        raise KeyeError(f"{path} has no {NAME} with sets by name; leave :{name} out")
    names = ", ".join(sorted(entries)[:12])
    if name is None and len(entries) != 1:
        raise KeyeError(f"{path} has {len(entries)} sets; name one of them behind it, as {path}:NAME ({names})")
    name = next(iter(entries)) if name is None else name
    if name not in entries:
        near = closest(name, entries)
        raise KeyeError(f"{path} has no set {name!r}; " + (f"did you mean {near}?" if near else f"it has {names}"))
    folder = path if path.is_dir() else path.parent
    return _register(folder, f"{path}:{name}", entries[name])


def _register(folder: Path, where: str, entry: Mapping[str, Any]) -> Registered:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str):
        raise KeyeError(f"{where} has no file_name; download the set and name its file there")
    if unknown := sorted(entry.keys() - _KNOWN):
        raise KeyeError(f"{where} has the unknown field {brief(unknown[0])}; known are {', '.join(sorted(_KNOWN))}")
    style, count = entry.get("formatting", "alpaca"), entry.get("num_samples")
    if style not in ("alpaca", "sharegpt"):
        raise KeyeError(f"{where} has the formatting {brief(style)}; use alpaca or sharegpt")
    if count is not None and not (is_whole(count) and count > 0):
        raise KeyeError(f"{where} has num_samples {brief(count)}; give a number of rows")
    columns = _texts(where, "columns", entry.get("columns"))
    if "kto_tag" in columns:
        raise KeyeError(f"{where} has labels of single replies (kto_tag), which are not learnt")
    known = {**(_ALPACA if style == "alpaca" else _SHAREGPT), **_SHARED}
    if unknown := sorted(columns.keys() - known.keys()):
        raise KeyeError(f"{where} has the unknown column {brief(unknown[0])}; known are {', '.join(known)}")
    names = {columns.get(name, default): ours for name, (ours, default) in known.items()}
    tags = {**_TAGS, **_texts(where, "tags", entry.get("tags"))}
    if unknown := sorted(tags.keys() - _TAGS.keys()):
        raise KeyeError(f"{where} has the unknown tag {brief(unknown[0])}; known are {', '.join(_TAGS)}")
    path = folder / str(entry["file_name"])
    ours = {theirs: name for theirs, name in names.items() if theirs is not None}
    return Registered(path, _prepare(ours, tags, is_ranking=bool(entry.get("ranking"))), count)


def _texts(where: str, name: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise KeyeError(f"{where} has {name} {brief(value)}; give names")
    return value


def _prepare(names: Mapping[str, str], tags: Mapping[str, str], *, is_ranking: bool) -> Prepare:
    roles = {tags[tag]: role for tag, role in _ROLES.items()}

    def message(entry: Any) -> Any:
        if not isinstance(entry, Mapping) or tags["role_tag"] not in entry:
            return entry
        role = entry[tags["role_tag"]]
        rest = {name: value for name, value in entry.items() if name not in (tags["role_tag"], tags["content_tag"])}
        is_text = isinstance(role, str)
        return {**rest, "role": roles.get(role, role) if is_text else role, "content": entry.get(tags["content_tag"])}

    def prepare(fields: Mapping[str, Any]) -> dict[str, Any]:
        renamed = set(names.values())
        values = {name: value for name, value in fields.items() if name not in names and name not in renamed}
        values |= {ours: fields[theirs] for theirs, ours in names.items() if fields.get(theirs) is not None}
        if not is_ranking:
            values.pop("chosen", None), values.pop("rejected", None)
        if isinstance(values.get("messages"), list):
            values["messages"] = [message(entry) for entry in values["messages"]]
        for name in ("chosen", "rejected"):
            if isinstance(values.get(name), Mapping):
                values[name] = message(values[name])
        if "instruction" in values and not {"output", "chosen"} & values.keys():  # for pre-training: the prompt alone
            values["text"] = values.pop("instruction")
            values.pop("input", None)
        return values

    return prepare
