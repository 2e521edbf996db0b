"""The drop-in utilities: signatures, defaults and results of the two releases, from messages to the processor."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keye.compat import utils_1_5, utils_preview
from keye.compat.processor import OfficialProcessor
from keye.config import ProcessorConfig
from keye.errors import KeyeError, KeyeWarning
from keye.hub import asset
from tests.support.clips import coded_frame, read_code, write_clip


def talk(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*items, {"type": "text", "text": "What?"}]}]


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(coded_frame(5, width, height))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (utils_preview.smart_resize, {"factor": 28, "min_pixels": 3136, "max_pixels": 16384 * 784}),
        (utils_1_5.smart_resize, {"factor": 28, "min_pixels": 3136, "max_pixels": 20480 * 784}),
        (utils_preview.fetch_image, {"size_factor": 28}),
        (utils_1_5.fetch_image, {"size_factor": 28, "is_video": False}),
        (utils_preview.fetch_video, {"image_factor": 28, "return_video_sample_fps": False}),
        (utils_1_5.fetch_video, {"image_factor": 28}),
        (utils_preview.process_vision_info, {"return_video_kwargs": False}),
        (
            utils_1_5.process_vision_info,
            {"conversations": None, "vision_infos": None, "image_factor": 28, "return_video_kwargs": None},
        ),
    ],
)
def test_defaults(function: Any, parameters: dict[str, Any]) -> None:
    result = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in result if p.default is not p.empty} == parameters


def test_preview_from_a_message_to_the_processor(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60)
    messages = talk({"type": "image", "image": picture()}, {"type": "video", "video": str(path), "nframes": 4})
    images, videos, kwargs = utils_preview.process_vision_info(messages, return_video_kwargs=True)
    assert [image.size for image in images] == [(84, 56)]
    assert (videos[0].dtype, videos[0].shape) == (torch.float32, (4, 3, 252, 420))
    assert kwargs == {"fps": [2.0]}
    assert [read_code(frame.permute(1, 2, 0).byte().numpy()) for frame in videos[0]] == [0, 20, 39, 59]
    text = "<|image_pad|> and <|video_pad|>"
    output = OfficialProcessor(ProcessorConfig.of("preview"))(text, images, videos, **kwargs)
    assert output.text == ["<|image_pad|>" * 6 + " and " + "<|video_pad|>" * (4 * 9 * 15)]
    assert output.video_grid_thw is not None
    assert output.video_grid_thw.tolist() == [[4, 18, 30]]
    assert output.second_per_grid_ts == (0.5,)
    assert utils_preview.process_vision_info(talk()) == (None, None)


def test_1_5_from_a_message_to_the_processor(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60)
    messages = talk(
        {"type": "image_url", "image_url": {"url": str(_saved(tmp_path))}}, {"type": "video", "video": path}
    )
    images, videos, kwargs = utils_1_5.process_vision_info(messages)
    assert images is not None
    assert videos is not None
    assert [image.size for image in images] == [(84, 56)]
    assert (videos[0].dtype, videos[0].shape) == (torch.uint8, (4, 3, 96, 160))
    assert (kwargs["timestamps"][0].dtype, kwargs["frame_types"][0].dtype) == (torch.float32, torch.int32)
    assert set(kwargs) == {"height", "width", "fast_height", "fast_width", "timestamps", "frame_types"}
    output = OfficialProcessor(ProcessorConfig.of("1.5"))("<|video_pad|>", videos=videos, **kwargs)
    assert output.text[0].startswith("<|frame|>0.0<|video_pad|>")
    assert output.num_frames == (4,)
    assert output.pixel_values_videos is not None
    assert output.video_grid_thw is not None
    assert len(output.pixel_values_videos) == output.video_grid_thw.prod(axis=1).sum()
    assert output.text[0].count("<|video_pad|>") * 4 == len(output.pixel_values_videos)


def _saved(folder: Path) -> Path:
    picture().save(folder / "picture.png")
    return folder / "picture.png"


def test_the_call_of_the_model_card_of_1_5() -> None:
    """The card passes an argument of Preview's utilities, which keye-vl-utils 1.5.2 ends with a TypeError."""
    messages = [{"role": "user", "content": [{"type": "video", "video": str(asset("demo.mp4")), "max_frames": 2}]}]
    with pytest.warns(KeyeWarning, match="1.5.2 itself refuses return_video_kwargs"):
        images, videos, kwargs = utils_1_5.process_vision_info(messages, return_video_kwargs=True)
    assert images is None and len(videos[0]) == 2 and len(kwargs["timestamps"][0]) == 2
    with pytest.warns(KeyeWarning):
        assert len(utils_1_5.process_vision_info(messages, return_video_kwargs=False)) == 2


def test_lists_of_frames() -> None:
    frames = [picture(), picture(), picture(100, 90)]
    video, fps = utils_preview.fetch_video({"video": frames, "fps": 3}, return_video_sample_fps=True)
    assert [frame.size for frame in video] == [(84, 56), (84, 56), (112, 84), (112, 84)]
    assert fps == 3
    tensor, facts = utils_1_5.fetch_video({"video": frames, "fps": 3})
    assert tensor.shape[0] == 3
    assert facts["timestamps"].tolist() == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert "timestamps" not in utils_1_5.fetch_video({"video": frames})[1]


def test_ignored_options_are_honoured_or_noted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60)
    assert len(utils_1_5.fetch_video({"video": path, "nframes": 3})[0]) == 3
    assert len(utils_1_5.fetch_video({"video": path, "nframes": 3, "strict_official": True})[0]) == 4
    with pytest.warns(UserWarning, match="speed has no effect on this video"):
        utils_1_5.fetch_video({"video": path, "speed": 2})
    with pytest.warns(UserWarning, match="resized_height has no effect on this image"):
        utils_1_5.fetch_image({"image": picture(), "resized_height": 90})


def test_the_budget_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60)
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "2e4")
    small = utils_preview.fetch_video({"video": path, "min_pixels": 3136})
    assert isinstance(small, torch.Tensor)
    assert small.shape[2] * small.shape[3] <= 10_000
    own = utils_preview.fetch_video({"video": path, "min_pixels": 3136, "total_pixels": 1e8})
    assert isinstance(own, torch.Tensor)
    assert own.shape[3] > small.shape[3]
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "many")
    with pytest.raises(KeyeError, match="VIDEO_MAX_PIXELS is 'many'"):
        utils_preview.fetch_video({"video": path})


def test_mistakes() -> None:
    for utilities in (utils_preview, utils_1_5):
        with pytest.raises(KeyeError, match="has none of image, image_url, video, video_url"):
            utilities.process_vision_info(talk({"type": "image"}))
        with pytest.raises(KeyeError, match="the factor is 32"):
            utilities.fetch_image({"image": picture()}, 32)
    with pytest.raises(KeyeError, match="neither conversations nor vision_infos"):
        utils_1_5.process_vision_info()
    processor = OfficialProcessor(ProcessorConfig.of("preview"))
    with pytest.raises(KeyeError, match="more <|image_pad|> than media"):
        processor("<|image_pad|><|image_pad|>", [picture()])
    with pytest.raises(KeyeError, match="2 rates are given for 1 videos"):
        processor("<|video_pad|>", videos=[np.zeros((2, 56, 56, 3), np.uint8)], fps=[1.0, 2.0])
    with pytest.raises(KeyeError, match="height is missing"):
        OfficialProcessor(ProcessorConfig.of("1.5"))("<|video_pad|>", videos=[np.zeros((2, 56, 56, 3), np.uint8)])
    with pytest.raises(KeyeError, match="is not published"):
        OfficialProcessor(ProcessorConfig())


def test_videos_with_and_without_times_in_one_conversation(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=30)
    listed, file = {"type": "video", "video": [picture(), picture()]}, {"type": "video", "video": str(clip)}
    _, videos, kwargs = utils_1_5.process_vision_info(talk(listed, file))
    assert videos is not None
    assert all(len(values) == 2 for values in kwargs.values())
    assert kwargs["timestamps"][0] is None
    text = OfficialProcessor(utils_1_5.CONFIG)("<|video_pad|>/<|video_pad|>", videos=videos, **kwargs).text[0]
    untimed, timed = text.split("/")
    assert untimed.startswith("<|frame|><|video_pad|>")
    assert timed.startswith("<|frame|>0.0")
    _, _, kwargs = utils_1_5.process_vision_info(talk(listed))
    assert "timestamps" not in kwargs


@pytest.mark.parametrize("utilities", [utils_preview, utils_1_5])
def test_media_by_their_addresses(utilities: Any, tmp_path: Path) -> None:
    clip, still = str(write_clip(tmp_path / "clip.mp4", frames=30)), tmp_path / "still.png"
    picture().save(still)
    for wrap in (lambda path: path, lambda path: {"url": path}):
        items = ({"type": "video_url", "video_url": wrap(clip)}, {"type": "image_url", "image_url": wrap(str(still))})
        images, videos, *_ = utilities.process_vision_info(talk(*items))
        _, named, *_ = utilities.process_vision_info(talk({"type": "video", "video": clip}))
        assert len(images) == 1
        assert torch.equal(videos[0], named[0])
    with pytest.raises(KeyeError, match="the object video_url has no url"):
        utilities.process_vision_info(talk({"type": "video_url", "video_url": {}}))
