"""Files of a hub repository to this machine: only those that hold data, checked, and continued where they were cut.

Keeps them in the layout of the hub library's cache (`blobs`, `refs`, `snapshots`), so that other programs share them.
That library keeps no part of an interrupted file and compares no checksums, which at 60 GB matters; here both are done.
Knows files and bytes; nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from keye.config import HubConfig
from keye.errors import KeyeError
from keye.files import complete_file
from keye.hub.gguf_files import choose_files
from keye.units import format_bytes

SMALL_SUFFIXES: Final = frozenset({".json", ".txt", ".jinja"})
WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".gguf"})
"""What is fetched. Code (.py) and pickles (.bin, .pt, .pth, .ckpt, .pkl) stay where they are."""

INDEX_FILE: Final = "model.safetensors.index.json"
MAX_SMALL_BYTES: Final = 256 << 20
"""Largest file that is fetched besides weights."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes of all wanted files."""

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_CHECKED_BLOCK: Final = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit. `digest` is the SHA-256 of a large file, the git object id of a small."""

    name: str
    size: int
    digest: str

    @property
    def is_weight(self) -> bool:
        return Path(self.name).suffix in WEIGHT_SUFFIXES


class Store:
    """The cached copy of one repository; with `choice` only of one GGUF model in it, see `choose_files`."""

    def __init__(self, name: str, config: HubConfig, choice: str | None = None) -> None:
        self.name, self.config, self.choice = name, config, choice
        self.folder = config.cache / f"models--{name.replace('/', '--')}"

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit meant when it was fetched."""
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def snapshot(self, commit: str) -> Path:
        """The folder of the files of one commit."""
        return self.folder / "snapshots" / commit

    def listing(self, commit: str) -> list[RemoteFile] | None:
        """What the repository holds at this commit, if it was asked before."""
        try:
            return [RemoteFile(**entry) for entry in json.loads(self._listing_file(commit).read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return None

    def remember(self, revision: str, commit: str, files: Iterable[RemoteFile]) -> None:
        """Notes which commit `revision` is, and what it holds."""
        _write(self._listing_file(commit), json.dumps([asdict(file) for file in files]))
        if revision != commit:
            _write(self.folder / "refs" / revision, commit)

    def is_here(self, commit: str, file: RemoteFile) -> bool:
        """Whether the file was fetched whole; it was compared with its digest then."""
        try:
            return (self.snapshot(commit) / file.name).stat().st_size == file.size
        except OSError:
            return False

    def wanted(self, commit: str, files: Iterable[RemoteFile], *, weights: bool) -> list[RemoteFile]:
        """Small files, and the weights: those that the index names, if it is here, else all in the better format."""
        files = list(files)
        if self.choice is not None:
            chosen = self.choose(file.name for file in files)
            return [file for file in files if file.name in chosen]
        small = [file for file in files if not file.is_weight]
        if not weights:
            return small
        index = self.snapshot(commit) / INDEX_FILE
        shards = [file for file in files if file.name.endswith(".safetensors")]
        if index.is_file():
            named = shards_of(index)
            if named is None or (missing := sorted(named - {file.name for file in shards})):
                lacking = "cannot be read" if named is None else f"names {missing[0]}, which the repository lacks"
                raise KeyeError(f"{INDEX_FILE} of {self.name} {lacking}: choose another revision.")
            shards = [file for file in shards if file.name in named]
        return small + (shards or [file for file in files if file.is_weight])

    def choose(self, names: Iterable[str]) -> list[str]:
        """Of these files those of the GGUF model that `choice` names."""
        assert self.choice is not None
        return choose_files(list(names), self.choice, self.name)

    def _listing_file(self, commit: str) -> Path:
        return self.folder / "keye" / f"{commit}.json"


def shards_of(index: Path) -> set[str] | None:
    """The weight files that an index names, None if it is none."""
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def fetch_checkpoint(store: Store, revision: str, weights: bool, progress: Progress | None) -> Path:
    """The snapshot of a hub checkpoint: as it is here if nothing is missing, else completed from the hub."""
    commit = store.commit_of(revision)
    files = store.listing(commit) if commit is not None else None
    if commit is not None and files is not None:
        present = store.snapshot(commit).is_dir()
        if present and all(store.is_here(commit, file) for file in store.wanted(commit, files, weights=weights)):
            return store.snapshot(commit)
    if store.config.offline:
        return _find_offline(store, commit, weights, "the hub is set offline (HF_HUB_OFFLINE)")
    try:
        if commit is None or files is None:
            commit, files = list_remote(store.name, revision, store.config)
            if store.choice is None:
                _check_files(store.name, files, weights)
            store.wanted(commit, files, weights=False)  # fails for a choice that is not there
            store.remember(revision, commit, files)
        _fetch(store, commit, files, weights=weights, progress=progress)
    except Exception as error:  # the errors of the hub library and of its HTTP client share no other base
        if sentence := _hub_sentence(store.name, revision, error):
            raise KeyeError(sentence) from error
        # The network failed, as the HTTP client of any version of the hub library says it.
        origins = {base.__module__.partition(".")[0] for base in type(error).__mro__}
        if not isinstance(error, ConnectionError | TimeoutError) and not origins & {"httpx", "httpx2", "requests"}:
            raise
        return _find_offline(store, commit, weights, f"the hub cannot be reached ({_first_line(error)})")
    return store.snapshot(commit)


def _check_files(name: str, files: Sequence[RemoteFile], weights: bool) -> None:
    has_tensors = any(file.name.endswith(".safetensors") for file in files)
    if not has_tensors and any(file.name.lower().endswith(".gguf") for file in files):
        choose_files([file.name for file in files], "", name)  # says what there is
    if not any(file.name == "config.json" for file in files):
        raise KeyeError(f"{name} on the hub holds no config.json, so it is not a checkpoint: check the name.")
    if weights and files and not has_tensors:
        raise KeyeError(f"{name} on the hub holds no safetensors weights; keye opens no pickle: choose a release that "
                        "does.")  # fmt: skip


def _find_offline(store: Store, commit: str | None, weights: bool, reason: str) -> Path:
    """What another program has fetched, if it looks complete; it left no list of what belongs to it."""
    if commit is not None and store.choice is not None and store.snapshot(commit).is_dir():
        store.choose(path.name for path in store.snapshot(commit).iterdir() if path.is_file())
        return store.snapshot(commit)
    if commit is not None and (store.snapshot(commit) / "config.json").is_file():
        folder = store.snapshot(commit)
        if not weights:
            return folder
        if not (folder / INDEX_FILE).is_file():
            is_complete = any(folder.glob("*.safetensors"))
        else:
            named = shards_of(folder / INDEX_FILE)
            is_complete = named is not None and all((folder / shard).is_file() for shard in named)
        if is_complete:
            return folder
    raise KeyeError(f"{store.name} is not complete on this machine and {reason}: connect and run the command again "
                    "(what is here is kept), or give a local folder.")  # fmt: skip


def _hub_sentence(name: str, revision: str, error: Exception) -> str | None:
    """What went wrong at the hub, and what to do about it; None for other errors."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{name} needs its terms accepted: do so on huggingface.co/{name}, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is neither a folder here nor a model on the hub: check the name, or `hf auth login` if private."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: give a branch, tag or commit of that repository."
    if isinstance(error, errors.HfHubHTTPError):
        if error.response is not None and error.response.status_code in (401, 403):
            return f"The hub refuses access to {name}: run `hf auth login` with an account that may read it."
        return f"The hub answered with an error for {name} ({_first_line(error)}): try again later."
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return f"{name} could not be fetched ({_first_line(error)}): run the command again; what is here is kept."
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def list_remote(name: str, revision: str, config: HubConfig) -> tuple[str, list[RemoteFile]]:
    """The commit of `revision` and the files that may be fetched, by one request; errors of the hub library pass."""
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=config.endpoint)
    info = api.model_info(name, revision=revision, files_metadata=True, timeout=config.timeout)
    files = []
    for sibling in info.siblings or []:
        file = sibling.rfilename
        if not _FILE_NAME.fullmatch(file) or Path(file).suffix not in SMALL_SUFFIXES | WEIGHT_SUFFIXES:
            continue
        large = sibling.lfs
        size, digest = (sibling.size, sibling.blob_id) if large is None else (large.size, large.sha256)
        if size is None or digest is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
            raise KeyeError(f"The hub does not tell size and checksum of {file} in {name}: try again later.")
        files.append(RemoteFile(file, size, digest))
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise KeyeError(f"The hub does not tell the commit of {name}: try again later.")
    return info.sha, files


def _fetch(store: Store, commit: str, files: list[RemoteFile], *, weights: bool, progress: Progress | None) -> None:
    """Brings all wanted files here. An interrupted file is continued at the next call, also by another process.

    Raises KeyeError for a file that does not match its checksum or is too large, and for a full disk; errors of the hub
    library pass through.
    """
    small = store.wanted(commit, files, weights=False)
    for file in small:
        if file.size > MAX_SMALL_BYTES and not file.is_weight:
            raise KeyeError(f"{file.name} of {store.name} has {file.size:,} bytes, too many for a file of its kind.")
    _fetch_all(store, commit, small, None if weights else progress)
    if weights:
        _fetch_all(store, commit, store.wanted(commit, files, weights=True), progress)


def _fetch_all(store: Store, commit: str, files: list[RemoteFile], progress: Progress | None) -> None:
    if not (missing := [file for file in files if not store.is_here(commit, file)]):
        return
    store.snapshot(commit).mkdir(parents=True, exist_ok=True)
    (store.folder / "blobs").mkdir(exist_ok=True)
    needed, free = sum(file.size for file in missing), shutil.disk_usage(store.folder).free
    partial_bytes = sum(part.stat().st_size for part in (store.folder / "blobs").glob("*.incomplete"))
    if needed > free + partial_bytes:
        raise KeyeError(f"{store.name} needs {format_bytes(needed)}, but {store.config.cache} has {format_bytes(free)} "
                        "left: free some space, or set HF_HOME to another disk.")  # fmt: skip
    counter = _Counter(sum(file.size for file in files) - needed, sum(file.size for file in files), progress)
    for file in missing:
        _fetch_one(store, commit, file, counter)


def _fetch_one(store: Store, commit: str, file: RemoteFile, counter: _Counter) -> None:
    """One file: from another commit if that has it, from where it was cut, or from its start; checked, then linked."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    blob = store.folder / "blobs" / file.digest
    part = blob.with_name(f"{file.digest}.incomplete")
    lock = store.config.cache / ".locks" / store.folder.name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.is_file():
            if part.is_file() and part.stat().st_size > file.size:
                part.unlink()
            with part.open("ab") as stream:
                begun = stream.tell()
                counter.update(begun)
                url = hf_hub_url(store.name, file.name, revision=commit, endpoint=store.config.endpoint)
                # The bar that the library would fill has one method; all versions accept it under this name.
                cast(Any, http_get)(
                    url, stream, resume_size=begun, headers=build_hf_headers(), expected_size=file.size,
                    displayed_filename=file.name, _tqdm_bar=counter,
                )  # fmt: skip
            _check(store.name, file, part)
            os.replace(part, blob)
        else:
            counter.update(file.size)
        target = store.snapshot(commit) / file.name
        target.unlink(missing_ok=True)
        try:
            target.symlink_to(Path("..", "..", "blobs", blob.name))
        except OSError:  # links cannot be made here
            os.replace(blob, target)


def _check(name: str, file: RemoteFile, part: Path) -> None:
    """Compares what arrived with what the hub said; what differs is deleted."""
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with part.open("rb") as stream:
        while block := stream.read(_CHECKED_BLOCK):
            digest.update(block)
    if part.stat().st_size != file.size or digest.hexdigest() != file.digest:
        part.unlink()
        raise KeyeError(f"{file.name} of {name} arrived damaged (its checksum is not the hub's) and was deleted: try "
                        "again.")  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


class _Counter:
    """Reports bytes that are here to `progress`."""

    def __init__(self, done: int, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = done, total, progress

    def update(self, count: int) -> None:
        """Adds bytes; a negative count subtracts what a server wants to send again."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
