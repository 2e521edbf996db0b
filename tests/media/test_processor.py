"""From pixels to patches and prompt pieces, the same way for files and arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media.pixels.patches import VisionInput, images_to_patches
from keye.media.processor import Processor, VisualSpan
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader
from tests.support.clips import write_clip

CONFIG = ProcessorConfig(video_min_tokens=16, video_max_tokens=16)
RNG = np.random.default_rng(0)


def random_frames(count: int, height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_patches_in_raster_order() -> None:
    frames = random_frames(2, 56, 84)
    vision = images_to_patches(frames, CONFIG)
    assert vision.grid_thw.tolist() == [[1, 4, 6], [1, 4, 6]]
    assert vision.pixel_values.shape == (48, 3, 14, 14)
    assert vision.pixel_values.dtype == np.float32
    frame, row, column = 1, 2, 5
    cut = frames[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14].transpose(2, 0, 1)
    expected = (cut.astype(np.float64) / 255 - 0.5) / 0.5
    assert np.abs(vision.pixel_values[frame * 24 + row * 6 + column] - expected).max() < 1e-6


def test_mean_and_deviation_of_each_channel() -> None:
    config = ProcessorConfig(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 1.0))
    values = images_to_patches(np.full((1, 28, 28, 3), 255, dtype=np.uint8), config).pixel_values
    assert values[0, :, 0, 0] == pytest.approx([1.8, 3.2, 0.7])


def test_image_item() -> None:
    item = Processor(CONFIG).image(Image.fromarray(random_frames(1, 60, 100)[0]))
    assert item.pieces == (VisualSpan("image", 8),)
    assert item.vision.grid_thw.tolist() == [[1, 4, 8]]
    assert item.visual_tokens == 8


def test_video_item_and_frames_in_memory_agree(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=60, size=(112, 112)))
    item = Processor(CONFIG).video(source)
    assert item.pieces[:4] == ("<|frame|>0.0", VisualSpan("video", 16), "<|frame|>0.7", VisualSpan("video", 16))
    assert item.visual_tokens == 64
    with VideoReader(source) as reader:
        plan = reader.plan(CONFIG)
        frames = reader.read(plan)
    memory = Processor(CONFIG).frames(frames, MediaOptions(timestamps=plan.timestamps))
    assert np.array_equal(memory.vision.pixel_values, item.vision.pixel_values)
    assert np.array_equal(memory.vision.grid_thw, item.vision.grid_thw)
    assert memory.pieces == item.pieces
    assert memory.timestamps == item.timestamps
    assert np.array_equal(Processor(CONFIG).video(source, plan=plan).vision.pixel_values, item.vision.pixel_values)


def test_frames_of_another_size_are_resized() -> None:
    vision = Processor(CONFIG).frames(random_frames(3, 200, 300), MediaOptions(timestamps=(0.0, 1.0, 2.0))).vision
    height, width = vision.grid_thw[0, 1:] * 14
    assert len(vision.grid_thw) == 3
    assert height < width
    assert height * width <= 16 * 784


def test_frame_text_is_configured() -> None:
    config = ProcessorConfig(video_min_tokens=16, video_max_tokens=16, frame_text="<{seconds:.2f} s>")
    item = Processor(config).frames(random_frames(1, 112, 112), MediaOptions(timestamps=(1.5,)))
    assert item.pieces == ("<1.50 s>", VisualSpan("video", 16))


def test_concatenate_and_tensors() -> None:
    parts = [images_to_patches(random_frames(1, 28, 28), CONFIG), images_to_patches(random_frames(2, 56, 28), CONFIG)]
    both = VisionInput.concatenate(parts)
    assert both.grid_thw.tolist() == [[1, 2, 2], [1, 4, 2], [1, 4, 2]]
    pixels, grid = both.tensors()
    assert pixels.shape == (20, 3, 14, 14)
    assert grid.tolist() == both.grid_thw.tolist()


def test_errors() -> None:
    with pytest.raises(KeyeError, match="must be uint8"):
        images_to_patches(np.zeros((1, 28, 28, 3), dtype=np.float32), CONFIG)
    with pytest.raises(KeyeError, match="has no frames"):
        Processor(CONFIG).frames(np.zeros((0, 28, 28, 3), dtype=np.uint8))
    with pytest.raises(KeyeError, match="no multiple of 28"):
        images_to_patches(random_frames(1, 28, 42), CONFIG)
    with pytest.raises(KeyeError, match="2 frames have 1 timestamps"):
        Processor(CONFIG).frames(random_frames(2, 112, 112), MediaOptions(timestamps=(0.0,)))
