"""Keys of media: the same content has the same key, and anything that changes visual tokens changes it."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keye.config import ProcessorConfig
from keye.data.frameforge import make_clip, write_mp4
from keye.engine.media import Frames, as_medium, plan_medium
from keye.media.content import content_key, source_hash
from keye.media.processor import Processor
from keye.media.source.fetch import fetch_source

CONFIG = ProcessorConfig.of("2.0", video_min_tokens=4)


def key(value: object, options: dict[str, Any] | None = None, config: ProcessorConfig = CONFIG) -> bytes:
    planned = plan_medium(as_medium(value, options), Processor(config))
    return content_key(planned.kind, planned.source, planned.options, planned.plan, config)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


def test_a_copy_has_the_key_of_the_file(video: Path, tmp_path: Path) -> None:
    copy = shutil.copyfile(video, tmp_path / "other name.mp4")
    assert key(video) == key(copy) == key(video.read_bytes())


def test_options_and_configuration_are_part_of_the_key(video: Path) -> None:
    keys = [
        key(video), key(video, {"fps": 1}), key(video, {"nframes": 4}), key(video, {"video_start": 1.0}),
        key(video, config=dataclasses.replace(CONFIG, image_mean=(0.1, 0.1, 0.1))),
        key(video, config=dataclasses.replace(CONFIG, frame_text="{seconds:.2f}")),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_a_file_is_hashed_once_and_again_when_it_changes(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "video.mp4", list[str]()
    shutil.copyfile(video, path)
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(name), digest(file, name))[1])
    first = source_hash(fetch_source(path))
    assert source_hash(fetch_source(path)) == first and len(read) == 1
    path.write_bytes(path.read_bytes() + b"\0")
    assert source_hash(fetch_source(path)) != first and len(read) == 2


def test_pictures_in_memory_are_distinguished_by_their_pixels() -> None:
    frames = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    other = frames.copy()
    other[3, 0, 0, 0] = 1
    assert key(Frames(frames, [0, 1, 2, 3])) == key(Frames(frames.copy(), [0.0, 1.0, 2.0, 3.0]))
    pictures = [Image.fromarray(frame) for frame in frames]
    paletted = Image.new("P", (56, 56))
    red, green = paletted.copy(), paletted.copy()
    red.putpalette([255, 0, 0])
    green.putpalette([0, 255, 0])
    keys = [
        key(Frames(frames, [0, 1, 2, 3])), key(Frames(other, [0, 1, 2, 3])), key(Frames(frames, [0, 1, 2, 4])),
        key(Frames(frames)), key(Frames(pictures)), key(Frames(pictures[:3])), key(frames), key(pictures[0]),
        key(red), key(green), key(torch.from_numpy(frames)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) - 1  # Frames without times are the bare array
