"""Checkpoints of a run, by `torch.distributed.checkpoint`: written in the background, complete or not there at all,
and read again by any number of processes.

A checkpoint holds what `Optimizer.state` returns and `progress.json`; weights that a stage does not change are those of
the model in the output folder. `OUTPUT/checkpoints/STAGE-STEP` is written under a name that begins with a dot and then
renamed; `STAGE-STEP-end` is the last of a stage, kept until the model in the output folder is that of the stage's end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from keye.config import ConfigError, read_json
from keye.errors import KeyeError
from keye.files import unwritable
from keye.train.parallel import Group

FOLDER: Final = "checkpoints"
PROGRESS_FILE: Final = "progress.json"
#: A folder of this name is a complete checkpoint: number of the stage, steps of it that are done.
_NAME: Final = re.compile(r"(\d{2,})-(\d{8,})(-end)?")
_DRAFT: Final = ".writing-"
# One process needs no group to write for itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Progress:
    """`step` steps and `seconds` seconds of stage number `stage` are done, and with `ended` the whole stage. `data` is
    the state of its batches, `guard` that of `keye.train.guard`."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    ended: bool = False
    data: dict[str, Any] | None = None
    guard: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its checkpoint."""
        return f"{self.stage:02d}-{self.step:08d}{'-end' if self.ended else ''}"

    def next_stage(self) -> Progress:
        """The beginning of the stage after this one."""
        return Progress(self.stage + 1)


class Checkpoints:
    """Reads and writes the checkpoints of the run in `output`, of which the `keep` newest stay; `names` are those of
    its stages. Every process of `group` calls the same methods in the same order."""

    def __init__(self, output: Path, names: list[str], keep: int, group: Group) -> None:
        self.folder, self.output, self.names, self.keep, self.group = output / FOLDER, output, names, keep, group
        # Writing in the background must not mix its messages with those of the training steps.
        self._others = dist.new_group(backend="gloo") if group.size > 1 else None
        self._writer, self._pending = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self._pending.set_result(None)
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def newest(self) -> Progress:
        """How far the run is; drafts that were never completed are removed. `ConfigError` where the stages that have
        begun had other names."""
        return self.group.first(self._newest)

    def _newest(self) -> Progress:
        for draft in self.folder.glob(f"{_DRAFT}*"):
            shutil.rmtree(draft, ignore_errors=True)
        complete = self._complete()
        if not complete:
            return Progress()
        saved = read_json(complete[-1] / PROGRESS_FILE)
        begun = saved.pop("names")[: saved["stage"] + 1]
        if self.names[: len(begun)] != begun:
            raise ConfigError(f"{self.output} holds a run that began with the stages {', '.join(begun)}; keep these, "
                              "or choose another output")  # fmt: skip
        return Progress(**saved)

    def _complete(self) -> list[Path]:
        """The complete ones, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def load(self, progress: Progress, state: Mapping[str, Tensor]) -> None:
        """Reads the checkpoint of `progress` into the tensors of `state`, whichever part of them this process has.
        `KeyeError` where it holds other tensors."""
        path = self.folder / progress.folder
        reader = FileSystemReader(path)
        saved = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()
                 if isinstance(entry, TensorStorageMetadata)}  # fmt: skip
        for name in sorted(saved.keys() | state.keys()):
            have, want = saved.get(name), tuple(state[name].shape) if name in state else None
            if have != want:
                raise KeyeError(f"{path} holds {name} {_shape(have)}, where this run has {_shape(want)}; resume with "
                                "the same model and stages")  # fmt: skip
        load(dict(state), storage_reader=reader, no_dist=self.group.size == 1)

    def save(self, progress: Progress, state: Mapping[str, Tensor] | None, *, wait: bool = False) -> None:
        """Copies `state` and writes it in the background, after what is still being written; older checkpoints go then.
        Without `state`, only the progress is written. `KeyeError` where the one before could not be written."""
        self.wait()
        copy = None if state is None else cast(dict[str, Any], self._stager.stage(dict(state)))
        self._pending = self._writer.submit(self._write, progress, copy)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        try:
            self._pending.result()
        except OSError as error:
            raise unwritable(self.folder, error) from None
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            raise unwritable(self.folder, next((c for c in causes if isinstance(c, OSError)), OSError())) from error

    def close(self) -> None:
        """Waits and ends the writer; nothing is raised."""
        with suppress(KeyeError):
            self.wait()
        self._writer.shutdown()
        self._stager.close()

    def _write(self, progress: Progress, state: dict[str, Any] | None) -> None:
        draft, path = self.folder / f"{_DRAFT}{progress.folder}", self.folder / progress.folder
        if self.group.rank == 0:
            draft.mkdir(parents=True, exist_ok=True)
        if state is not None:
            single = self.group.size == 1
            save(state, storage_writer=FileSystemWriter(draft), process_group=self._others, no_dist=single)
        if self.group.rank == 0:  # all have written: the metadata are written after everything else
            (draft / PROGRESS_FILE).write_text(json.dumps({**asdict(progress), "names": self.names}, allow_nan=False))
            _sync(draft)
            os.rename(draft, path)
            _sync(self.folder)
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Has the disk hold what was written to a folder, so that a rename cannot come before it."""
    for path in (*folder.iterdir(), folder) if folder.name.startswith(_DRAFT) else (folder,):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shape(size: tuple[int, ...] | None) -> str:
    if size is None:
        return "nowhere"
    return "as one number" if not size else f"as {' x '.join(map(str, size))}"
