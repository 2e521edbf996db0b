"""A tiny random model, a short video, and the command line run inside this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keye.cli import main
from keye.data.frameforge import make_clip, write_mp4

NANO = Path(__file__).parents[2] / "configs/nano"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output as the one JSON object it must be."""
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `keye` with arguments."""

    def invoke(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return invoke


def tiny_config() -> dict[str, Any]:
    """The configuration of keye-nano with fewer and smaller layers."""
    config = json.loads((NANO / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "num_experts": 2, "moe_intermediate_size": 32, "max_position_embeddings": 1024}
    config["sa_config"] |= {"indexer_num_heads": 2}
    config["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return config


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model with random weights; tests that change it work on a copy."""
    from keye.config import model_config_from_dict
    from keye.models.load import save_model
    from keye.train.recipes.nano.initialise import fresh_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(NANO, folder)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    save_model(fresh_model(model_config_from_dict(tiny_config()), 0).bfloat16(), folder)
    return folder


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds, 112 x 112 pixels."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path
