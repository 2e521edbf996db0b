"""The output folder of a run: which files it may write, how far the run is, and the optimizer's state.

The folder is at any time a model that can be loaded: its weights and the files that go along with them.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye.config import ConfigError, read_json
from keye.files import complete_file
from keye.train.config import TrainConfig

STATE_FILE, PROGRESS_FILE, LOG_FILE = "resume/state.safetensors", "progress.json", "log.jsonl"
#: Files of the model folder that go along with the weights.
COMPANIONS = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json",
              "tokenizer_config.json")  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """`step` steps and `seconds` seconds of stage number `stage` are done; `data` is the state of its batches."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    data: dict[str, Any] | None = None


class Checkpoint:
    """Reads and writes the progress of a run in `folder`; `names` are those of its stages."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def load(self) -> tuple[Progress, dict[str, Tensor] | None]:
        """How far the run is, and the optimizer's state unless it is that of a stage that has ended since.
        `ConfigError` where the stages that have begun had other names."""
        if not (self.folder / PROGRESS_FILE).exists():
            return Progress(), None
        progress = self._parse(read_json(self.folder / PROGRESS_FILE))
        path = self.folder / STATE_FILE
        if not path.exists():
            return progress, None
        with safe_open(path, framework="pt") as file:
            saved = self._parse(json.loads((file.metadata() or {}).get("progress", json.dumps(asdict(progress)))))
            if (saved.stage, saved.step) < (progress.stage, progress.step):
                return progress, None
            return saved, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save(self, progress: Progress, state: dict[str, Tensor] | None) -> None:
        """Writes both after the weights; without `state`, which a finished stage no longer needs, its file goes."""
        saved = json.dumps({**asdict(progress), "names": self.names})
        path = self.folder / STATE_FILE
        if state is not None:
            # The state knows its own step: a run that is killed between the two files resumes at the state's.
            path.parent.mkdir(exist_ok=True)
            with complete_file(path) as draft:
                save_file(state, draft, metadata={"progress": saved})
        with complete_file(self.folder / PROGRESS_FILE) as draft:
            draft.write_text(saved)
        if state is None:
            path.unlink(missing_ok=True)

    def _parse(self, saved: dict[str, Any]) -> Progress:
        data = saved.get("data", {"step": saved["step"]} if saved["step"] else None)
        progress = Progress(saved["stage"], saved["step"], saved["seconds"], data)
        begun = saved.get("names", self.names)[: progress.stage + 1]
        if self.names[: len(begun)] != begun:
            raise ConfigError(f"{self.folder} holds a run that began with the stages {', '.join(begun)}; keep these, "
                              "or choose another output")  # fmt: skip
        return progress


def copy_companions(model: Path, output: Path) -> None:
    """Copies the files that go along with the weights."""
    for name in COMPANIONS:
        if (model / name).exists() and model != output:
            shutil.copyfile(model / name, output / name)


def check_output(config: TrainConfig, resume: bool) -> bool:
    """Whether the output folder is new; `ConfigError` where a run there would overwrite something."""
    out = config.output
    if not out.exists():
        return True
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; output must be a folder")
    if not (out / PROGRESS_FILE).exists():
        _check_unused(config)
    elif not resume:
        raise ConfigError(f"{out} already holds a run; resume it or choose another output")
    return False


def _check_unused(config: TrainConfig) -> None:
    """`ConfigError` where a folder without a run has files of others that a run would change."""
    out = config.output
    if any(out.glob("model*.safetensors*")):
        raise ConfigError(f"{out} holds a model that no run made; choose another output so that it is kept")
    for name in COMPANIONS:
        ours, theirs = config.model / name, out / name
        if theirs.exists() and ours.exists() and ours.read_bytes() != theirs.read_bytes():
            raise ConfigError(f"{theirs} belongs to no run; choose another output so that it is kept")
    if (log := out / LOG_FILE).exists():
        with log.open("rb") as file, suppress(ValueError, AttributeError):
            if {"stage", "step", "minutes"} <= json.loads(file.readline(1 << 16) or b"{}").keys():
                return
        raise ConfigError(f"{log} belongs to no run; choose another output so that it is kept")
