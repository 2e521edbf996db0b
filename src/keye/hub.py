"""A model's name or path to a folder of files on this machine.

Fetches only file types that hold data, never code and never pickles. Knows names and files; reads no tensor.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Final

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from keye.errors import KeyeError

PACKAGED: Final = {"nano": "nano", "keye-nano": "nano"}
"""Names of the models inside this package, and their folders under assets/."""

PUBLISHED: Final = {
    "preview": "Kwai-Keye/Keye-VL-8B-Preview",
    "1.5": "Kwai-Keye/Keye-VL-1_5-8B",
    "2.0": "Kwai-Keye/Keye-VL-2.0-30B-A3B",
}
"""Short names of the published checkpoints, and their names on the hub."""

ALLOWED_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.jinja")
"""What is fetched from the hub. Code (.py) and pickles (.bin, .pt, .pth, .ckpt, .pkl) stay there."""

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INDEX_FILE: Final = "model.safetensors.index.json"


def known_names() -> list[str]:
    """Every name `resolve` accepts besides paths and other names on the hub."""
    return [*PACKAGED, *PUBLISHED, *PUBLISHED.values()]


def asset(name: str) -> Path:
    """A file or folder that ships inside the package, such as "nano"; raises KeyeError if it is missing."""
    path = Path(str(resources.files("keye").joinpath("assets", name)))
    if not path.exists():
        raise KeyeError(f"{name} is missing from this installation of keye: install the package again.")
    return path


def resolve(name_or_path: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder that holds the checkpoint `name_or_path`, fetched from the hub if it is not on this machine.

    Tried in this order: a known name, a path, `organisation/name` on the hub (the local cache before the network).
    To open a folder called like a known name, write `./nano`. `revision` is a branch, tag or commit on the hub and
    counts for nothing else. Without `weights` only the small files are fetched. Raises KeyeError, with one sentence,
    for whatever cannot be a checkpoint.
    """
    name = str(name_or_path)
    if not name.strip():
        raise KeyeError("The model's name is empty: give one of " + ", ".join(known_names()) + ", or a folder.")
    if isinstance(name_or_path, str):
        if name.lower() in PACKAGED:
            return _checked(asset(PACKAGED[name.lower()]), weights)
        if name.lower() in PUBLISHED:
            return _fetch(PUBLISHED[name.lower()], revision, weights)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path.exists, False also for names too long for the file system
        return _checked(path, weights)
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name):
        return _fetch(name, revision, weights)
    if isinstance(name_or_path, Path) or "/" in name or "\\" in name or name.startswith("~"):
        raise KeyeError(f"{path} does not exist: give a checkpoint folder or one of {', '.join(known_names())}.")
    raise KeyeError(_unknown(name))


def _unknown(name: str) -> str:
    """The sentence for a name nobody knows: what is near it, and all there is."""
    full_names = {known.lower(): known for known in known_names()}
    full_names |= {known.rpartition("/")[2].lower(): known for known in known_names()}
    near = {full_names[match]: None for match in difflib.get_close_matches(name.lower(), full_names, n=2)}
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"Unknown model {name[:80]!r}: {hint}Known names: {', '.join(known_names())}; a folder's path works too."


def _checked(folder: Path, weights: bool) -> Path:
    """`folder` itself if it can be a checkpoint: a directory with config.json and no pickles in place of weights."""
    if not folder.is_dir():
        raise KeyeError(f"{folder} is a file: give the checkpoint folder that holds config.json and the weights.")
    if not (folder / "config.json").is_file():
        raise KeyeError(f"{folder} holds no config.json, so it is not a checkpoint: give the folder that does.")
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if weights and pickles and not any(name.endswith(".safetensors") for name in names):
        raise KeyeError(
            f"{folder} holds its weights only as pickle files ({pickles[0]}), which can run code when opened: "
            "convert them to safetensors or fetch the safetensors release."
        )
    return folder


def _fetch(name: str, revision: str | None, weights: bool) -> Path:
    """The snapshot of a hub checkpoint: the cached one if it is whole, else a fetched one."""
    try:
        cached = _snapshot(name, revision, weights, local_only=True)
    except LocalEntryNotFoundError:
        cached = None
    if cached is not None and _is_whole(cached, weights):
        return _checked(cached, weights)
    try:
        return _checked(_snapshot(name, revision, weights, local_only=False), weights)
    except LocalEntryNotFoundError as error:
        raise KeyeError(
            f"{name} is not complete on this machine and the hub cannot be reached: connect, or give a local folder."
        ) from error


def _snapshot(name: str, revision: str | None, weights: bool, *, local_only: bool) -> Path:
    """Ask the hub library for a snapshot; LocalEntryNotFoundError passes through, any other error is a KeyeError."""
    patterns = [pattern for pattern in ALLOWED_FILES if weights or pattern != "*.safetensors"]
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=local_only
        )
    except LocalEntryNotFoundError:
        raise
    except Exception as error:  # the errors of the hub library and of its HTTP client share no other base
        raise KeyeError(_hub_sentence(name, revision, error)) from error
    return Path(folder)


def _is_whole(folder: Path, weights: bool) -> bool:
    """Whether a cached snapshot has its configuration and every weight file its index names."""
    if not (folder / "config.json").is_file():
        return False
    if not weights:
        return True
    index = folder / _INDEX_FILE
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):  # cut short or not an index: fetch it again
        return False
    return all((folder / shard).is_file() for shard in shards)


def _hub_sentence(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong at the hub, and what to do about it."""
    if isinstance(error, GatedRepoError):
        return f"{name} needs its terms accepted: do so on huggingface.co/{name}, then run `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"{name} is neither a folder here nor a model on the hub: check the name, or `hf auth login` if private."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: give a branch, tag or commit of that repository."
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name} is not on this machine and the hub is set offline: unset HF_HUB_OFFLINE or give a folder."
    if isinstance(error, HfHubHTTPError):
        return f"The hub answered with an error for {name} ({_first_line(error)}): try again later."
    return f"{name} could not be fetched ({_first_line(error)}): check the network and the free disk space."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
