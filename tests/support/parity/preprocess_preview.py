"""Set `preprocess`, Keye-VL-8B-Preview: rules of keye-vl-utils 1.0.0, and the drop-in utilities themselves.

Decoded clips are written to lossless files and read back, so the whole way from file to pixels is compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from keye.compat import utils_preview
from keye.compat.processor import OfficialProcessor
from keye.config import ProcessorConfig, preview_video_max_pixels
from keye.media import sampling, sizes
from keye.media.plan import make_plan
from tests.support.parity.cases import Case, Check, NotApplicable
from tests.support.parity.preprocess import (
    Row,
    check_pixels,
    nframes_row,
    official_options,
    outcome,
    picture,
    video_info,
)

CONFIG = ProcessorConfig.of("preview")
RATE_TOLERANCE = 1e-9
#: Mean and deviation of the image processor where a row gives none.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def run_preview(case: Case, check: Check) -> None:
    run_row = _row_function(case.meta["cases"][0])
    for i, row in enumerate(case.meta["cases"]):
        run_row(case, check, i, row)
    for i, row in enumerate(case.meta.get("errors", [])):
        _refused_image(check, i, row)


def _row_function(row: Row) -> Callable[[Case, Check, int, Row], None]:
    """The comparison for the rows of a file, chosen by the fields of the first."""
    fields = set(row)
    for wanted, function in (
        ({"VIDEO_MAX_PIXELS"}, _environment),
        ({"conversation"}, _conversation),
        ({"read_video_arguments"}, _whole_reader),
        ({"factor"}, _processor_resize),
        ({"height", "kw"}, _utilities_resize),
        ({"kw", "grid_thw"}, _patches),
        ({"source", "mode"}, _image),
        ({"n", "n_out"}, _frame_list),
        ({"stored_frames"}, _clip_pixels),
        ({"total_frames", "height"}, _clip_sizes),
    ):
        if wanted <= fields:
            return function
    if {"ele", "total_frames", "video_fps"} <= fields:
        ranged = isinstance(row.get("out"), list) or (row["ele"].keys() <= {"video_start", "video_end"} and row["ele"])
        return _frame_range if ranged else _nframes
    raise NotApplicable(f"rows with fields {', '.join(sorted(fields))} are unknown to this version")


def _utilities_resize(case: Case, check: Check, i: int, row: Row) -> None:
    got = outcome(check, f"row {i}", row, lambda: utils_preview.smart_resize(row["height"], row["width"], **row["kw"]))
    if got is not None:
        check.equal(f"row {i} {row}", list(got), row["out"])


def _processor_resize(case: Case, check: Check, i: int, row: Row) -> None:
    limits = {name: row[name] for name in ("factor", "min_pixels", "max_pixels")}
    got = outcome(
        check, f"row {i}", row,
        lambda: sizes.resize_for_processor(row["height"], row["width"], **limits, strict_official=True),
    )  # fmt: skip
    if got is not None:
        check.equal(f"row {i} {row}", list(got), row["out"])


def _nframes(case: Case, check: Check, i: int, row: Row) -> None:
    nframes_row(check, i, row, CONFIG)


def _frame_range(case: Case, check: Check, i: int, row: Row) -> None:
    total, native = row["total_frames"], row["video_fps"]
    got = outcome(check, f"row {i}", row, lambda: sampling.find_frame_range(total, native, **row["ele"]))
    if got is not None:
        check.equal(f"row {i} {row}", list(got), row["out"])


def _patches(case: Case, check: Check, i: int, row: Row) -> None:
    """The image processor alone: size, pixels and order of patches."""
    kw = row["kw"]
    config = ProcessorConfig.of(
        "preview", processor_min_pixels=kw["min_pixels"], processor_max_pixels=kw["max_pixels"],
        image_mean=tuple(kw.get("mean", CLIP_MEAN)), image_std=tuple(kw.get("std", CLIP_STD)),
    )  # fmt: skip
    vision = OfficialProcessor(config).image(case.tensors[f"{i}.image"].numpy())
    check.equal(f"row {i} grid", vision.grid_thw[0].tolist(), row["grid_thw"])
    want = case.tensors[f"{i}.pixel_values"]
    check.close(f"row {i} patches", torch.from_numpy(vision.pixel_values), want, 1e-5)


def _image(case: Case, check: Check, i: int, row: Row) -> None:
    source = row["string"] if row["source"] != "pil" else picture(case.tensors[f"{i}.in"], row["mode"])
    image = utils_preview.fetch_image({row.get("key", "image"): source, **row["ele"]})
    check.equal(f"row {i} mode and size", [image.mode, *image.size], [row["out_mode"], *row["out_size_wh"]])
    check_pixels(case, check, f"row {i}", np.asarray(image), case.tensors[f"{i}.out"].numpy())


def _refused_image(check: Check, i: int, row: Row) -> None:
    """Elements that the official code refuses; "PIL MODE WxH" stands for a picture of that size."""
    ele = dict(row["ele"])
    value = ele.get("image")
    if isinstance(value, str) and value.startswith("PIL "):
        _, mode, size = value.split()
        width, height = map(int, size.split("x"))
        ele["image"] = Image.new(mode, (width, height))
    outcome(check, f"error {i}", row, lambda: utils_preview.fetch_image(ele))


def _frame_list(case: Case, check: Check, i: int, row: Row) -> None:
    names = [f"{i}.frames"] if f"{i}.frames" in case.tensors else _numbered(case, f"{i}.frame_")
    value = [Image.fromarray(frame) for name in names for frame in _as_frames(case.tensors[name].numpy())]
    ele = {"video": value, **row["ele"], "strict_official": True}
    video, fps = utils_preview.fetch_video(ele, return_video_sample_fps=True)
    check.equal(f"row {i} frames", len(video), row["n_out"])
    sizes_wh = row.get("sizes_wh") or [row["size_wh"]] * row["n_out"]
    check.equal(f"row {i} sizes", [list(frame.size) for frame in video], sizes_wh)
    check.equal(f"row {i} rate", fps, row["sample_fps"])
    stored = [f"{i}.out"] if f"{i}.out" in case.tensors else _numbered(case, f"{i}.out_")
    wanted = [frame for name in stored for frame in _as_frames(case.tensors[name].numpy())]
    for k, (got, want) in enumerate(zip(video, wanted, strict=False)):
        check_pixels(case, check, f"row {i} frame {k}", np.asarray(got), want)


def _clip_sizes(case: Case, check: Check, i: int, row: Row) -> None:
    plan = outcome(check, f"row {i}", row, lambda: make_plan(video_info(row), CONFIG, official_options(row["ele"])))
    if plan is None:
        return
    check.equal(f"row {i} shape", [plan.frames, 3, plan.height, plan.width], row["shape"])
    indices, count = list(plan.frame_indices), row["n_indices"]
    check.equal(f"row {i} count", len(indices), count)
    text = indices if len(row["indices"]) == count else indices[:6] + indices[-6:]
    check.equal(f"row {i} indices", text, row["indices"])
    check.equal(f"row {i} rate", abs(plan.sample_fps - row["sample_fps"]) <= RATE_TOLERANCE, True)


def _clip_pixels(case: Case, check: Check, i: int, row: Row) -> None:
    plan = make_plan(video_info(row), CONFIG, official_options(row["ele"]))
    check.equal(f"row {i} indices", list(plan.frame_indices), row["indices"])
    with lossless_clip(case.tensors[f"{i}.clip"].numpy(), row["video_fps"]) as path:
        ele = {"video": path, **row["ele"], "strict_official": True}
        video, fps = utils_preview.fetch_video(ele, return_video_sample_fps=True)
    check.equal(f"row {i} shape", [str(video.dtype), *video.shape], ["torch.float32", *row["out_shape"]])
    check.equal(f"row {i} rate", abs(fps - row["sample_fps"]) <= RATE_TOLERANCE, True)
    _check_video(check, f"row {i}", video, case.tensors[f"{i}.out"])


def _whole_reader(case: Case, check: Check, i: int, row: Row) -> None:
    """The official fallback samples all frames that its reader returned, which had been cut to the range before (the
    recorded stand-in does not cut): so does ours, over a clip without a range."""
    ele = {key: value for key, value in row["ele"].items() if key not in ("video_start", "video_end")}
    plan = make_plan(video_info({"height": 56, "width": 84, **row}), CONFIG, official_options(ele))
    if "indices" in row:
        check.equal(f"row {i} indices", list(plan.frame_indices), row["indices"])
    else:
        check.equal(f"row {i} frames", plan.frames, row["shape"][0])
    check.equal(f"row {i} rate", abs(plan.sample_fps - row["sample_fps"]) <= RATE_TOLERANCE, True)


def _conversation(case: Case, check: Check, i: int, row: Row) -> None:
    """`process_vision_info`: what a "$" name stands for is a stored picture or clip."""
    name = f"row {i} {row['name']}"
    with lossless_clip(case.tensors["src.clip"].numpy(), 4.0) as clip:
        talk = _filled(row["conversation"], case, clip)
        result = outcome(check, name, row, lambda: utils_preview.process_vision_info(talk, row["return_video_kwargs"]))
    if result is None:
        return
    check.equal(f"{name} returned", len(result), row["n_returned"])
    if row["return_video_kwargs"]:
        check.equal(f"{name} kwargs", result[2], row["video_kwargs"])
    images, videos = result[:2]
    check.equal(f"{name} images", images and [list(image.size) for image in images], row["images"])
    for k, image in enumerate(images or ()):
        check_pixels(case, check, f"{name} image {k}", np.asarray(image), case.tensors[f"{i}.image_{k}"].numpy())
    check.equal(f"{name} videos", videos and [_described(video) for video in videos], row["videos"])
    for k, video in enumerate(videos or ()):
        stored = case.tensors.get(f"{i}.video_{k}")
        if stored is None:
            continue
        if isinstance(video, list):
            check_pixels(case, check, f"{name} video {k}", np.asarray(video[0]), _as_frames(stored.numpy())[0])
        else:
            _check_video(check, f"{name} video {k}", video, stored)


def _environment(case: Case, check: Check, i: int, row: Row) -> None:
    before = os.environ.get("VIDEO_MAX_PIXELS")
    os.environ["VIDEO_MAX_PIXELS"] = row["VIDEO_MAX_PIXELS"]
    try:
        got = outcome(check, f"row {i}", row, preview_video_max_pixels)
    finally:
        del os.environ["VIDEO_MAX_PIXELS"]
        if before is not None:
            os.environ["VIDEO_MAX_PIXELS"] = before
    if got is not None:
        check.equal(f"row {i}", got, row["VIDEO_TOTAL_PIXELS"])


class lossless_clip:
    """A context manager: frames uint8 [F, H, W, 3] as a video file whose pixels come back as they are."""

    def __init__(self, frames: np.ndarray, fps: float) -> None:
        self.frames, self.rate = frames, Fraction(fps).limit_denominator(10_000)

    def __enter__(self) -> str:
        self.folder = tempfile.TemporaryDirectory(prefix="keye-parity-")
        path = Path(self.folder.name) / "clip.mov"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=self.rate)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = *self.frames.shape[1:3], "rgb24"
            for frame in self.frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return str(path)

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def _filled(value: Any, case: Case, clip: str) -> Any:
    if isinstance(value, dict):
        filled = {key: _filled(item, case, clip) for key, item in value.items()}
        return {**filled, "strict_official": True} if "video" in value else filled
    if isinstance(value, list):
        return [_filled(item, case, clip) for item in value]
    if value == "$clip":
        return clip
    if isinstance(value, str) and value.startswith("$"):
        return Image.fromarray(case.tensors[f"src.{value[1:]}"].numpy())
    return value


def _described(video: Any) -> Row:
    if isinstance(video, list):
        return {"kind": "frames", "n": len(video), "sizes_wh": [list(frame.size) for frame in video]}
    return {"kind": "tensor", "shape": list(video.shape), "dtype": str(video.dtype)}


def _check_video(check: Check, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """The stored first frames, within one level: another torch may round its filter otherwise."""
    off = (got[: len(want)] - want.float()).abs()
    check.equal(f"{name} pixels off by more than 1", int((off > 1).sum()), 0)


def _numbered(case: Case, prefix: str) -> list[str]:
    names = (name for name in case.tensors if name.startswith(prefix))
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def _as_frames(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 4 else array[None]
