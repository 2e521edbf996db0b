"""The output folder of a run: which files it may write there, and that one run at a time does.

The folder is at any time a model that can be loaded: its weights and the files that go along with them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from keye.config import ConfigError
from keye.config.toml import to_toml
from keye.files import output_file, unwritable
from keye.train.checkpoint import FOLDER, PROGRESS_FILE
from keye.train.config import TrainConfig

LOG_FILE, CONFIG_FILE, LOCK_FILE = "log.jsonl", "config.toml", ".lock"
#: Files of the model folder that go along with the weights.
COMPANIONS: Final = (
    "config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def check_output(config: TrainConfig, resume: bool) -> bool:
    """Whether the output folder is new; `ConfigError` where a run there would overwrite something."""
    out = config.output
    if not out.exists():
        return True
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; output must be a folder")
    if (out / PROGRESS_FILE).exists() and not (out / FOLDER).exists():
        raise ConfigError(f"{out} holds a run of an older version of keye, which cannot be resumed; choose another "
                          "output, with this folder as the model to start from its weights")  # fmt: skip
    if (out / FOLDER).exists() and not resume:
        raise ConfigError(f"{out} already holds a run; resume it or choose another output")
    if not (out / FOLDER).exists() and not (out / LOCK_FILE).exists():
        _check_unused(config)
    return False


def _check_unused(config: TrainConfig) -> None:
    """`ConfigError` where a folder without a run has files of others that a run would change."""
    out = config.output
    if any(out.glob("model*.safetensors*")):
        raise ConfigError(f"{out} holds a model that no run made; choose another output so that it is kept")
    for name in (*COMPANIONS, CONFIG_FILE):
        ours, theirs = config.model / name, out / name
        if theirs.exists() and (not ours.exists() or theirs.read_bytes() != ours.read_bytes()):
            raise ConfigError(f"{theirs} belongs to no run; choose another output so that it is kept")
    if (log := out / LOG_FILE).exists():
        with log.open("rb") as file, suppress(ValueError, AttributeError):
            if {"stage", "step", "minutes"} <= json.loads(file.readline(1 << 16) or b"{}").keys():
                return
        raise ConfigError(f"{log} belongs to no run; choose another output so that it is kept")


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it in the block; `ConfigError` while another is in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK_FILE).open("wb")
    except OSError as error:
        raise unwritable(output, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another run is writing to {output}; choose another output, or wait for its end"
            ) from None
        yield


def begin_output(config: TrainConfig) -> None:
    """Writes what the folder has from the beginning: the resolved configuration and what goes along with weights, which
    a stage may have changed since."""
    for name in COMPANIONS:
        if (config.model / name).exists() and not (config.output / name).exists():
            shutil.copyfile(config.model / name, config.output / name)
    with output_file(config.output / CONFIG_FILE) as draft:
        draft.write_text(to_toml(config), encoding="utf-8")
