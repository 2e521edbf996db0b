"""Settings that were not honoured: one warning each, and none where all were."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeWarning, MediaError, Option
from keye.media.image import plan_image
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source
from keye.media.video import plan_video
from tests.support.clips import write_clip

V15, V20 = ProcessorConfig.of("1.5"), ProcessorConfig()
PREVIEW = ProcessorConfig.of("preview", processor_min_pixels=3136, processor_max_pixels=1_003_520)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Three seconds at 30 frames a second."""
    return fetch_source(write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=90))


def messages(plan: object) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan()  # type: ignore[operator]
    assert all(isinstance(warning.message, KeyeWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (V20, {"nframes": 200}, "nframes=200 cannot be met for clip.mp4: it gets 90 frames"),
        (V20, {"min_frames": 91}, "min_frames=91 cannot be met for clip.mp4: it gets 90 frames"),
        (V20, {"fps": 60}, "fps=60 cannot be met for clip.mp4: it gets 30 frames a second"),
        (V20, {"max_pixels": 1}, "max_pixels=1 cannot be met for clip.mp4: it gets 308x196 pixels a frame"),
        (V20, {"min_pixels": 200_000, "video_total_pixels": 400_000}, "video_total_pixels=400000 cannot be met"),
        (
            V20,
            {"min_frame_similarity": 0.5},
            "min_frame_similarity has no effect on clip.mp4: Keye-VL 2.0 has no slow and fast frames",
        ),
        (V20, {"adaptive_budget": True, "video_count": 2}, "adaptive_budget has no effect on clip.mp4: several"),
        (V20, {"timestamps": (0.0, 1.0)}, "timestamps has no effect on clip.mp4: a file has times of its own"),
        (V15, {"adaptive_budget": True}, "adaptive_budget has no effect on clip.mp4: Keye-VL 1.5 has none"),
        (PREVIEW, {"nframes": 5}, "nframes=5 cannot be met for clip.mp4: it gets 4 frames"),
    ],
)
def test_a_setting_that_is_not_honoured(
    clip: Source, config: ProcessorConfig, options: dict[str, object], sentence: str
) -> None:
    (warning,) = messages(lambda: plan_video(clip, config, MediaOptions(**options)))  # type: ignore[arg-type]
    assert warning.startswith(sentence)
    strict = MediaOptions(**options, strict_official=True)  # type: ignore[arg-type]
    assert messages(lambda: plan_video(clip, config, strict)) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": 2.0, "max_frames": 4},
        {"nframes": 6, "min_frames": 2},
        {"min_pixels": 60_000, "max_pixels": 120_000},
        {"video_total_pixels": 784 * 1000, "adaptive_budget": True},
        {"fps": 30.03},
    ],
)
def test_silence_where_all_is_honoured(clip: Source, options: dict[str, float]) -> None:
    assert messages(lambda: plan_video(clip, V20, MediaOptions(**options))) == []  # type: ignore[arg-type]


def test_preview_takes_frames_in_pairs(clip: Source) -> None:
    assert messages(lambda: plan_video(clip, PREVIEW, MediaOptions(max_frames=1))) == [
        "max_frames=1 cannot be met for clip.mp4: it gets 2 frames"
    ]


def test_once_for_a_request(clip: Source) -> None:
    assert len(messages(lambda: Processor(V15).video(clip, MediaOptions(max_pixels=1)))) == 1
    frames = np.zeros((6, 56, 56, 3), dtype=np.uint8)
    requested = MediaOptions(video_start=1.0, nframes=9)
    for config in (PREVIEW, V15, V20):
        video, count = messages(lambda config=config: Processor(config).frames(frames, requested))  # type: ignore[misc]
        assert video.startswith("video_start has no effect on the list of frames: its times are not known; give")
        assert count == "nframes=9 cannot be met for the list of frames: it gets 6 frames"


def test_images(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    source, small = fetch_source(tmp_path / "a.png"), MediaOptions(max_pixels=1)
    sentence = "max_pixels=1 cannot be met for a.png: it gets 28x28 pixels"
    assert messages(lambda: plan_image(source, V20, small)) == [sentence]
    assert messages(lambda: Processor(V20).image(source, small)) == [sentence]
    plan = plan_image(source, V20)
    assert messages(lambda: Processor(V20).image(source, small, plan=plan)) == []
    assert messages(lambda: plan_image(source, V20, MediaOptions(min_pixels=5000, max_pixels=10_000))) == []


def test_a_short_single_video_has_a_share_of_the_budget(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "long.mp4", frames=120, fps=2, size=(640, 480)))
    requested = MediaOptions(video_total_pixels=120 * 784 * 1000)
    full, share = (plan_video(source, V20, requested.replace(adaptive_budget=on)) for on in (None, True))
    assert (full.frames, share.frames) == (120, 120)
    assert full.tokens_per_frame > 200 and 64 <= share.tokens_per_frame <= 91  # 0.09 of 1000, and the official one more
    always = ProcessorConfig(adaptive_budget=True)
    assert plan_video(source, always, requested).tokens_per_frame == share.tokens_per_frame
    assert plan_video(source, always, requested.replace(adaptive_budget=False)) == full


def test_each_door_spells_options_in_its_own_way() -> None:
    error = MediaError("{} is cut short; pass {}", "a{}.mp4", Option("video_end", 2.1))
    assert str(error) == "a{}.mp4 is cut short; pass video_end=2.1"
    assert error.worded(lambda option: f"--end {option.value}") == "a{}.mp4 is cut short; pass --end 2.1"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes, as between processes
    assert str(MediaError("a sentence with {braces}")) == "a sentence with {braces}"


def test_a_size_that_the_limits_change(clip: Source) -> None:
    nano = ProcessorConfig(video_min_tokens=4, video_max_tokens=16, image_max_tokens=16)
    requested, rounded = (MediaOptions(resized_height=height, resized_width=2 * height) for height in (200, 50))
    image, frames = Image.new("RGB", (60, 40)), np.zeros((4, 56, 56, 3), dtype=np.uint8)
    sentence = "resized_height=200 and resized_width=400 cannot be met for {}: it gets 140x56 pixels"
    for name, call in {
        "clip.mp4": lambda options: plan_video(clip, nano, options),
        "the list of frames": lambda options: Processor(nano).frames(frames, options),
        "<image>": lambda options: Processor(nano).image(image, options),
    }.items():
        told_of = messages(lambda call=call: call(requested))  # type: ignore[misc]
        assert [text.removesuffix(" a frame") for text in told_of] == [sentence.format(name)]
        assert messages(lambda call=call: call(rounded)) == []  # type: ignore[misc]
        assert messages(lambda call=call: call(requested.replace(strict_official=True))) == []  # type: ignore[misc]
