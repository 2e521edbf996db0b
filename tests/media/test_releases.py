"""Preview, 1.5 and 2.0: what each makes of the same files and pictures, and where we depart from the official code."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keye.config import ProcessorConfig, load_processor_config
from keye.config.media import MediaOptions, media_options
from keye.errors import KeyeError
from keye.media import sampling, sizes
from keye.media.image import open_frames, open_image, plan_image, resize_image
from keye.media.pixels.patches import as_frames, as_picture
from keye.media.processor import Processor, VisualSpan
from keye.media.source.fetch import fetch_source
from keye.media.video import DecodeLimits, VideoReader, plan_video
from tests.support.clips import coded_frame, read_code, write_clip

PREVIEW = ProcessorConfig.of("preview", processor_min_pixels=3136, processor_max_pixels=1_003_520)
V15, V20 = ProcessorConfig.of("1.5"), ProcessorConfig.of("2.0")
STRICT = MediaOptions(strict_official=True)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


# Configuration


@pytest.mark.parametrize(
    ("architecture", "release"),
    [
        ("KeyeForConditionalGeneration", "preview"),
        ("KeyeVL1_5ForConditionalGeneration", "1.5"),
        ("KeyeVLMoeForConditionalGeneration", "671B"),
        ("KeyeVL2MoeForConditionalGeneration", "2.0"),
    ],
)
def test_the_architecture_tells_the_rules(tmp_path: Path, architecture: str, release: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 1003520}')
    config = load_processor_config(tmp_path)
    assert config.release.name == release
    if release == "2.0":
        assert (config.image_max_tokens, config.processor_max_pixels) == (1280, None)
    else:
        assert (config.processor_min_pixels, config.processor_max_pixels) == (3136, 1003520)


def test_budgets_of_the_releases() -> None:
    budgets = [(c.video_min_tokens, c.video_max_tokens, c.video_total_tokens) for c in (PREVIEW, V15, V20)]
    assert budgets == [(128, 768, 115_200), (48, 768, 65_536), (64, 256, 184_320)]


# Images


def test_preview_resizes_an_image_twice_and_puts_it_on_white() -> None:
    large = Image.new("RGB", (1400, 1400), (9, 9, 9))
    assert resize_image(large, PREVIEW).shape == (980, 980, 3)
    assert resize_image(large, V20).shape == (1400, 1400, 3)
    # A request that asks for more gets it; officially the processor shrinks it all the same.
    requested = MediaOptions(max_pixels=1_500_000)
    assert resize_image(large, PREVIEW, requested).shape == (1204, 1204, 3)
    assert resize_image(large, PREVIEW, requested.replace(strict_official=True)).shape == (980, 980, 3)
    clear = Image.new("RGBA", (56, 56), (9, 9, 9, 0))
    assert resize_image(clear, PREVIEW)[0, 0].tolist() == [255, 255, 255]
    assert resize_image(clear, V15)[0, 0].tolist() == [9, 9, 9]


def test_a_plan_of_an_image_is_its_size() -> None:
    source = fetch_source(encoded(Image.new("RGB", (1000, 1400))))
    for config in (PREVIEW, V15, V20):
        item = Processor(config).image(source)
        assert item.plan == plan_image(source, config)
        assert item.plan is not None
        assert item.pieces == (VisualSpan("image", item.plan.visual_tokens),)


def test_thin_pictures_work_unless_strict() -> None:
    limits = {"factor": 28, "min_pixels": 3136, "max_pixels": 6272}
    assert sizes.resize_for_processor(300, 30, **limits) == (224, 28)  # type: ignore[arg-type]
    with pytest.raises(KeyeError, match="has no size"):
        sizes.resize_for_processor(300, 30, **limits, strict_official=True)  # type: ignore[arg-type]
    with pytest.raises(KeyeError, match="aspect ratio above 200"):
        Processor(V20).image(Image.new("RGB", (201, 1)))
    with pytest.raises(KeyeError, match="aspect ratio above 200"):
        plan_image(fetch_source(encoded(Image.new("RGB", (401, 2)))), PREVIEW)


# Video files


def test_one_file_by_three_releases(tmp_path: Path) -> None:
    """Preview has one run of tokens and time in its positions, the others a mark and a time before each frame."""
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=90))
    preview, v15, v20 = (Processor(config).video(source) for config in (PREVIEW, V15, V20))
    assert preview.vision.grid_thw.tolist() == [[6, 18, 30]]
    assert preview.pieces == (VisualSpan("video", 6 * 9 * 15),)
    assert preview.second_per_grid == pytest.approx(0.5)
    assert v15.second_per_grid is None
    assert v15.pieces[0] == "<|frame|>0.0"
    assert isinstance(v20.pieces[1], VisualSpan)
    assert v20.frame_count == v15.frame_count == preview.frame_count == 6
    assert len(v20.vision.grid_thw) == 6
    for item in (preview, v15, v20):
        assert item.visual_tokens == item.plan.visual_tokens  # type: ignore[union-attr]
        patches = int(item.vision.grid_thw.prod(axis=1).sum())
        assert item.vision.pixel_values.shape == (patches, 3, 14, 14)
        assert item.visual_tokens == patches // 4


def write_scenes(path: Path) -> Path:
    """Four seconds: two of saturated red, two of bluish grey; every frame with its number in the upper half."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 384, "yuv420p"
        for index in range(40):
            frame = np.full((384, 640, 3), (230, 10, 10) if index < 20 else (110, 115, 120), dtype=np.uint8)
            frame[:24] = coded_frame(index, 640, 48)[:24]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_slow_and_fast_frames_of_a_file(tmp_path: Path) -> None:
    source = fetch_source(write_scenes(tmp_path / "clip.mp4"))
    item = Processor(V15).video(source)
    plan = item.plan
    assert plan is not None
    assert plan.fast.types == (0, 1, 1, 1, 0, 1, 1, 1)  # type: ignore[union-attr]
    slow, fast = plan.tokens_per_frame, plan.fast.tokens_per_frame  # type: ignore[union-attr]
    assert fast <= 0.3 * slow
    assert item.visual_tokens == plan.visual_tokens == 2 * slow + 6 * fast
    assert item.pieces[:5] == (
        "<|frame|>0.0", VisualSpan("video", slow), "<|frame|>0.6<|fast_start|>", VisualSpan("video", fast),
        "<|fast_end|><|frame|>1.1<|fast_start|>",
    )  # fmt: skip
    assert plan.to_dict()["fast"]["types"] == [0, 1, 1, 1, 0, 1, 1, 1]
    # A video too long to keep is decoded twice, with the same result.
    again = Processor(V15, native_bytes=0).video(source)
    assert np.array_equal(again.vision.pixel_values, item.vision.pixel_values)
    assert np.array_equal(Processor(V15).video(source, plan=plan).vision.pixel_values, item.vision.pixel_values)  # type: ignore[arg-type]
    # With no likeness demanded one frame is slow; before decoding, a plan counts all as slow.
    assert Processor(V15).video(source, MediaOptions(min_frame_similarity=0.0)).pieces.count("<|frame|>0.0") == 1
    assert plan_video(source, V15).fast is None


def test_options_that_the_official_code_ignores_are_honoured(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=90))
    with VideoReader(source) as reader:
        for config in (V15, V20):
            assert reader.plan(config, MediaOptions(nframes=4)).frames == 4
            assert reader.plan(config, MediaOptions(nframes=4, strict_official=True)).frames == 6
            requested = reader.plan(config, MediaOptions(resized_height=100, resized_width=61))
            assert (requested.height, requested.width) == (112, 56)
        assert reader.plan(V15, MediaOptions(min_frames=20)).frames == 20
        assert reader.plan(V15, MediaOptions(min_frames=20, strict_official=True)).frames == 6
        part = reader.plan(V15, MediaOptions(video_start=1.0, video_end=2.0))
        assert (part.timestamps[0], part.timestamps[-1]) == (1.0, 2.0)
        with pytest.raises(KeyeError, match="takes neither video_start nor video_end"):
            reader.plan(V15, MediaOptions(video_start=1.0, strict_official=True))
        assert reader.plan(PREVIEW, MediaOptions(max_pixels=784 * 2000, resized_width=None)).tokens_per_frame > 128


def test_clips_on_which_the_official_code_fails(tmp_path: Path) -> None:
    short = fetch_source(write_clip(tmp_path / "short.mp4", frames=8))
    one_frame = fetch_source(write_clip(tmp_path / "one.mp4", frames=1))
    assert plan_video(short, V15).timestamps == (0.0,)
    with pytest.raises(KeyeError, match=r"short.mp4 is shorter than a sampling step of 0.5 s.* raise fps or leave"):
        plan_video(short, V15, STRICT)
    with pytest.raises(KeyeError, match="budget for short.mp4 holds no frame; raise video_total_pixels"):
        plan_video(short, V15, STRICT.replace(video_total_pixels=100))
    assert plan_video(one_frame, PREVIEW).frames == 1
    with pytest.raises(KeyeError, match="at least 2 are needed"):
        plan_video(one_frame, PREVIEW, STRICT)
    assert plan_video(short, PREVIEW, MediaOptions(nframes=49)).frames == 8
    assert Processor(PREVIEW).video(one_frame).vision.grid_thw[0, 0] == 1


def test_the_rule_of_1_5_rounds_times_in_single_precision() -> None:
    frames = np.zeros((1, 112, 112, 3), dtype=np.uint8)
    texts = [Processor(config).frames(frames, MediaOptions(timestamps=(1.55,))).pieces[0] for config in (V15, V20)]
    assert texts == ["<|frame|>1.5", "<|frame|>1.6"]


# Pictures in memory


def test_lists_of_pictures() -> None:
    pictures = [Image.fromarray(coded_frame(i)) for i in range(5)]
    preview = Processor(PREVIEW).frames(pictures, MediaOptions(fps=4))
    assert preview.vision.grid_thw.tolist() == [[6, 6, 12]]  # an even number: the last is repeated
    assert preview.second_per_grid == 0.25
    v15 = Processor(V15).frames(pictures)
    assert v15.pieces[0] == "<|frame|>"  # no time is known
    v20 = Processor(V20).frames(pictures, MediaOptions(fps=4))
    assert v20.timestamps == (0.0, 0.25, 0.5, 0.75, 1.0)
    timed = Processor(V20).frames(pictures, MediaOptions(timestamps=(0.0, 3.0, 4.0, 8.0, 9.5)))
    assert timed.timestamps == (0.0, 3.0, 4.0, 8.0, 9.5)
    assert timed.frame_count == 5
    halved = Processor(PREVIEW).frames(pictures, MediaOptions(max_frames=2, fps=4))
    assert (halved.frame_count, halved.second_per_grid) == (2, pytest.approx(0.625))
    with pytest.raises(KeyeError, match="5 frames have 2 timestamps"):
        Processor(PREVIEW).frames(pictures, MediaOptions(timestamps=(0.0, 1.0)))


def test_arrays_and_tensors_are_the_same_pictures() -> None:
    frames = np.stack([coded_frame(i) for i in range(3)])
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for value in (tensor, tensor.float(), tensor.bfloat16(), frames.astype(np.int64), frames.transpose(0, 3, 1, 2)):
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            assert np.abs(as_frames(value).astype(int) - frames).max() <= 1
        else:
            assert np.array_equal(as_frames(value), frames)
    assert as_picture(tensor[0]).size == as_picture(frames[0]).size == (160, 96)
    assert as_picture(frames[0, :, :, 0]).mode == "L"
    for value, message in [
        (frames / 255, "multiply them by 255"),
        (frames.astype(np.float32) - 300, "between 0 and 255"),
        (np.zeros((2, 5, 5, 5), np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros((5, 5, 3), np.uint8), "is not a picture"),
        (np.zeros((2, 8, 8, 4), np.uint8), "4 channels"),
        ([], "is not empty"),
        ("frames", "list of pictures"),
    ]:
        with pytest.raises(KeyeError, match=message):
            as_frames(value)


def test_frames_as_a_data_url(tmp_path: Path) -> None:
    """The form in which clients send the frames of a video: several JPEG images parted by commas."""
    pictures = [Image.fromarray(coded_frame(i)) for i in range(3)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(encoded(p, "JPEG")).decode() for p in pictures)
    frames = open_frames(url)
    assert [read_code(np.asarray(frame)) for frame in frames] == [0, 1, 2]
    data = write_clip(tmp_path / "clip.mp4").read_bytes()
    video = "data:video/mp4;base64," + base64.b64encode(data).decode()
    assert open_frames(video) is None
    assert plan_video(fetch_source(video), V20).frames == 4
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        pictures[i].save(file)
    assert [read_code(np.asarray(frame)) for frame in open_frames([files[0], encoded(pictures[2]), str(files[1])])] == [
        0,
        2,
        1,
    ]
    with pytest.raises(KeyeError, match="not valid base64"):
        open_frames("data:video/jpeg;base64,AAAA,%%%")
    with pytest.raises(KeyeError, match="not int"):
        open_image(5)


# Options


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("image", {"fps": 2}, "fps is not an option of images"),
        ("video", {"speed": 2}, "speed is not an option of videos"),
        ("video", {"fps": float("nan")}, "fps is nan"),
        ("video", {"nframes": 2.5}, "must be a whole number"),
        ("video", {"total_pixels": 1, "video_total_pixels": 1}, "are the same option"),
        ("video", {"resized_height": 5}, "must be given together"),
        ("video", {"adaptive_budget": "yes"}, "adaptive_budget is 'yes'; give true or false"),
        ("video", {"min_frames": 10, "max_frames": 4}, "min_frames=10 is above max_frames=4"),
        ("image", {"min_pixels": 100_000, "max_pixels": 10}, "min_pixels=100000 is above max_pixels=10"),
        ("video", {"min_frame_similarity": 2}, "between 0 and 1"),
        ("video", {"timestamps": [1, 0]}, "finite and ascending"),
        ("video", {"timestamps": "soon"}, "must be a list of seconds"),
        ("video", {"video_start": "soon"}, "give seconds"),
    ],
)
def test_bad_options(kind: Any, value: dict[str, Any], message: str) -> None:
    with pytest.raises(KeyeError, match=message):
        media_options(kind, value)


def test_preview_counts() -> None:
    def count(total: int, **options: Any) -> int:
        return sampling.smart_nframes(total, 30.0, PREVIEW, MediaOptions(**options))

    assert count(300) == 20
    assert count(300, nframes=49) == 48
    assert count(10_000_000) == 768
    assert count(41, max_frames=1) == 2
    assert DecodeLimits().threads == 1


def test_preview_places_uneven_frames_at_their_own_times(tmp_path: Path) -> None:
    pictures, processor = [Image.fromarray(coded_frame(i)) for i in range(5)], Processor(PREVIEW)
    uneven = MediaOptions(timestamps=(1.0, 2.0, 3.5, 10.0, 21.0))
    assert processor.frames(pictures, uneven).second_per_grid == (0.0, 1.0, 2.5, 9.0, 20.0, 20.0)
    assert processor.frames(pictures, uneven.replace(strict_official=True)).second_per_grid == 5.0
    for even in ((0.0, 0.33, 0.67, 1.0, 1.33), (3.0,) * 5):
        assert isinstance(processor.frames(pictures, MediaOptions(timestamps=even)).second_per_grid, float)
    times = [0, 1000, 2500, 3000, 9000, 20000]
    source = fetch_source(write_clip(tmp_path / "uneven.mkv", frames=6, times_ms=times))
    item = processor.video(source, MediaOptions(nframes=6))
    assert item.second_per_grid == pytest.approx(item.timestamps)
    assert len(set(np.diff(item.timestamps))) > 1
    assert isinstance(processor.video(source, MediaOptions(nframes=6, strict_official=True)).second_per_grid, float)


def test_fast_frames_are_never_larger_than_slow_ones_of_a_size_asked_for() -> None:
    def sizes_of(height: int, width: int, *, strict: bool = False) -> sizes.FrameSizes:
        requested = MediaOptions(resized_height=height, resized_width=width, strict_official=strict)
        return sizes.compute_frame_sizes(360, 640, 4, V15, requested, fast=4)

    assert sizes_of(28, 28) == sizes.FrameSizes((56, 56), (56, 56))
    assert sizes_of(280, 560) == sizes.FrameSizes((280, 560), (140, 280)), "its shape is that of the slow frame"
    assert sizes_of(28, 28, strict=True).fast == sizes.compute_frame_sizes(360, 640, 4, V15, STRICT, fast=4).fast


@pytest.mark.parametrize("config", [PREVIEW, V15, V20])
@pytest.mark.filterwarnings("error")
def test_a_part_of_a_list_whose_times_are_known(config: ProcessorConfig) -> None:
    pictures, processor = [Image.fromarray(coded_frame(i)) for i in range(9)], Processor(config)
    timed = MediaOptions(timestamps=(0.0, 1.0, 2.0, 3.5, 5.0, 6.0, 7.0, 8.0, 9.0), video_start=2.0, video_end=6.0)
    part, same = processor.frames(pictures, timed), MediaOptions(timestamps=(2.0, 3.5, 5.0, 6.0))
    assert part.timestamps == (2.0, 3.5, 5.0, 6.0)
    assert part.second_per_grid == processor.frames(pictures[2:6], same).second_per_grid
    assert np.array_equal(part.vision.pixel_values, processor.frames(pictures[2:6], same).vision.pixel_values)
    rated = processor.frames(pictures, MediaOptions(fps=2, video_start=1.0, video_end=2.5))
    expected = processor.frames(pictures[2:6], MediaOptions(fps=2))
    assert np.array_equal(rated.vision.pixel_values, expected.vision.pixel_values)
    assert rated.timestamps == (() if config is PREVIEW else (1.0, 1.5, 2.0, 2.5))
    strict = processor.frames(pictures, MediaOptions(fps=2, video_start=1.0, strict_official=True))
    assert strict.frame_count == (10 if config is PREVIEW else 9)
    between = processor.frames(pictures, timed.replace(video_start=2.5, video_end=3.0))
    assert set(between.timestamps) == {2.0}, "the picture on display"
    with pytest.raises(KeyeError, match=r"video_start=10.5 lies after the end of the video at 10.12 s"):
        processor.frames(pictures, timed.replace(video_start=10.5, video_end=None))
