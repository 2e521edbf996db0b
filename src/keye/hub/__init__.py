"""A model's name or path to a folder of files on this machine.

Fetches only file types that hold data, never code and never pickles. Knows names and files, and that a GGUF file is a
folder of small files beside its tensors; reads no tensor.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

from keye.config import HubConfig, hub_config
from keye.errors import KeyeError, Option
from keye.releases import RELEASES

PACKAGED: Final = {"nano": "nano", "keye-nano": "nano"}
"""Names of the models inside this package, and their folders under assets/."""

PUBLISHED: Final = {
    release.name.lower(): release.hub_name for release in RELEASES.values() if release.hub_name is not None
}
"""Short names of the published checkpoints, and their names on the hub."""

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

#: Files of a split model after its first one.
_LATER_PART: Final = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,199}")


def known_names() -> list[str]:
    """Every name `resolve` accepts besides paths and other names on the hub."""
    return [*PACKAGED, *PUBLISHED, *PUBLISHED.values()]


def asset(name: str) -> Path:
    """A file or folder that ships inside the package, such as "nano"; raises KeyeError if it is missing."""
    path = Path(str(resources.files("keye").joinpath("assets", name)))
    if not path.exists():
        raise KeyeError(f"{name} is missing from this installation of keye: install the package again.")
    return path


def resolve(
    name_or_path: str | Path, *, revision: str | None = None, weights: bool = True, config: HubConfig | None = None,
    progress: Callable[[int, int], None] | None = None, mmproj: str | Path | None = None,
) -> Path:  # fmt: skip
    """The folder that holds the checkpoint `name_or_path`, fetched from the hub if it is not on this machine.

    Tried in this order: a known name, a path, `organisation/name` on the hub. To open a folder called like a known
    name, write `./nano`. A GGUF file, or a folder with one, becomes a temporary folder of the small files that follow
    from it; `mmproj` is its vision part, by default the only `mmproj*.gguf` beside it. `organisation/name:Q4_K_M` is
    one of several in a repository, with its vision part. `revision` is a branch, tag or
    commit on the hub and counts for nothing else; `name@revision` says the same. Without `weights` only the small files
    are fetched. What is here is not asked for again: a branch stays at the commit that it was when it was first
    fetched. `config` is what the environment says unless given; `progress` is called with the bytes that are here and
    the bytes of all. Raises KeyeError, with one sentence, for whatever cannot be a checkpoint.
    """
    name = str(name_or_path)
    if not name.strip():
        raise KeyeError("The model's name is empty: give one of " + ", ".join(known_names()) + ", or a folder.")
    if mmproj is not None and not (os.path.exists(os.path.expanduser(name)) and find_gguf(Path(name).expanduser())):
        raise KeyeError("{} is for a model in a GGUF file, which {} is not; leave it out", Option("mmproj"), name)
    if isinstance(name_or_path, str) and name.lower() in PACKAGED:
        return _check_folder(asset(PACKAGED[name.lower()]), weights)
    path = Path(os.path.expanduser(name))
    repository, _, tag = name.partition("@")
    repository, _, choice = repository.partition(":")
    repository = PUBLISHED.get(repository.lower(), repository)
    may_be_on_hub = isinstance(name_or_path, str) and _HUB_NAME.fullmatch(repository)
    if not may_be_on_hub or (name.lower() not in PUBLISHED and os.path.exists(path)):
        if os.path.exists(path):  # unlike Path.exists, False also for names too long for the file system
            if (model := find_gguf(path)) is not None:
                return _small_files(model, None if mmproj is None else Path(mmproj).expanduser())
            return _check_folder(path, weights)
        if isinstance(name_or_path, Path) or "/" in name or "\\" in name or name.startswith("~"):
            raise KeyeError(f"{path} does not exist: give a checkpoint folder or one of {', '.join(known_names())}.")
        raise KeyeError(_explain_unknown(name))
    if tag and revision is not None:
        raise KeyeError(f"{name} names a revision already: leave {revision!r} out.")
    chosen = revision or tag or "main"
    if not _REVISION.fullmatch(chosen) or ".." in chosen:
        raise KeyeError(f"{chosen!r} cannot be a revision: give a branch, tag or commit of {repository}.")
    from keye.hub.download import Store, fetch_checkpoint  # not needed for what is on this machine

    store = Store(repository, config or hub_config(), choice or None)
    if choice:
        folder = fetch_checkpoint(store, chosen, weights, progress)
        files = store.choose(path.name for path in folder.iterdir())
        return _small_files(folder / files[0], folder / files[-1] if "mmproj" in files[-1].lower() else None)
    return _check_folder(fetch_checkpoint(store, chosen, weights, progress), weights)


def _small_files(model: Path, mmproj: Path | None) -> Path:
    from keye.weights.gguf.folder import small_files  # only needed for GGUF

    return small_files(model, mmproj)


def _explain_unknown(name: str) -> str:
    """The sentence for an unknown name: the closest names, and all that are known."""
    full_names = {known.lower(): known for known in known_names()}
    full_names |= {known.rpartition("/")[2].lower(): known for known in known_names()}
    near = {full_names[match]: None for match in difflib.get_close_matches(name.lower(), full_names, n=2)}
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"Unknown model {name[:80]!r}: {hint}Known names: {', '.join(known_names())}; a folder's path works too."


def find_gguf(path: Path) -> Path | None:
    """The GGUF file of a model at `path`: the file itself, or the only one in a folder without another checkpoint (of a
    split model the first). None where there is none; `KeyeError` for a folder with several models."""
    from keye.weights.gguf.folder import is_mmproj  # not needed for a checkpoint on the hub
    from keye.weights.gguf.reader import is_gguf

    if not path.is_dir():
        return path if is_gguf(path) else None
    names = sorted(path.glob("*.gguf"))
    if not names or any(path.glob("*.safetensors")):
        return None
    models = [file for file in names if not is_mmproj(file) and not _LATER_PART.search(file.name)]
    if len(models) != 1:
        listed = ", ".join(file.name for file in models[:5]) or "vision parts alone"
        raise KeyeError(f"{path} holds several models or none ({listed}): give the GGUF file itself.")
    return models[0]


def _check_folder(folder: Path, weights: bool) -> Path:
    """`folder` itself if it can be a checkpoint: a directory with config.json and no pickles in place of weights."""
    if not folder.is_dir():
        raise KeyeError(f"{folder} is a file: give a GGUF file, or the folder that holds config.json and the weights.")
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if "config.json" not in names:
        raise KeyeError(f"{folder} holds no config.json, so it is not a checkpoint: give the folder that does.")
    if weights and pickles and not any(name.endswith(".safetensors") for name in names):
        raise KeyeError(f"{folder} holds its weights only as pickle files ({pickles[0]}), which can run code when "
                        "opened: convert them to safetensors or fetch the safetensors release.")  # fmt: skip
    return folder
