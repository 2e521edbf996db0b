"""Set `preprocess`: sizes, sampling, budgets and pixels of Keye-VL 2.0. What a file holds is read off its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import PIL
from PIL import Image
from torch import Tensor

from keye.config import ProcessorConfig
from keye.errors import KeyeError
from keye.media import sampling
from keye.media.image import resize_exactly, resize_image
from keye.media.video import VideoInfo, make_plan
from parity_harness.cases import Case, Check, NotApplicable, is_preview

CONFIG = ProcessorConfig()
#: Request fields that the official 2.0 sampling reads; it documents `nframes` and ignores it.
SAMPLING = ("fps", "min_frames", "max_frames", "video_total_pixels")
LIMITS = ("min_pixels", "max_pixels")
TIMESTAMP_TOLERANCE = 1e-6

Row = dict[str, Any]


def run_preprocess(case: Case, check: Check) -> None:
    meta = case.meta
    if is_preview(meta):
        raise NotApplicable("preprocessing of Keye-VL-8B-Preview is not implemented yet")
    if "threshold" in meta or "frame_types" in meta:
        raise NotApplicable("slow-fast frame typing of Keye-VL 1.5 is not implemented yet")
    run_row = _row_function(meta)
    for i, row in enumerate(meta["cases"]):
        run_row(case, check, i, row)


def _row_function(meta: Row) -> Callable[[Case, Check, int, Row], None]:
    """The comparison for the rows of a file, told by their fields."""
    row, what = meta["cases"][0], str(meta["what"])
    fields = set(row)
    if {"factor", "min_pixels", "max_pixels"} <= fields:
        return _smart_resize
    if {"ele", "total_frames", "frame_types"} <= fields:
        raise NotApplicable("the slow-fast resize budget of Keye-VL 1.5 is not implemented yet")
    if {"clip", "v20"} <= fields:
        return _decoded_clip
    if {"n_images", "v20"} <= fields:
        return _frame_list
    if {"num_videos", "total_frames"} <= fields:
        return _long_clip
    if {"num_videos", "duration"} <= fields:
        return _duration_budget
    if "calculate_video_frame_range" in what:
        return _frame_range
    if {"ele", "total_frames", "video_fps"} <= fields:
        if "1.5" in what:
            raise NotApplicable("frame counts of Keye-VL 1.5 (no minimum of frames) are not implemented yet")
        return _smart_nframes
    if "out_hw" in fields:
        return _image_pixels
    raise NotApplicable(f"rows with fields {', '.join(sorted(fields))} are unknown to this version")


def _outcome(check: Check, name: str, row: Row, run: Callable[[], Any]) -> Any:
    """The result of `run`, or None where official code and keye both refuse the row; one of them alone is a failure."""
    try:
        result = run()
    except KeyeError as error:
        check.equal(name, "an error" if "error" in row else f"KeyeError: {error}", "an error")
        return None
    if "error" in row:
        check.fail(name, f"returned {result} where the official function raises {row['error']}")
        return None
    return result


def _smart_resize(case: Case, check: Check, i: int, row: Row) -> None:
    options = {name: row[name] for name in ("factor", "min_pixels", "max_pixels")}
    size = _outcome(check, f"row {i}", row, lambda: sampling.smart_resize(row["height"], row["width"], **options))
    if size is not None:
        check.equal(f"row {i} {row}", list(size), row["out"])


def _smart_nframes(case: Case, check: Check, i: int, row: Row) -> None:
    options = {name: row["ele"][name] for name in SAMPLING if name in row["ele"]}
    total, native = row["total_frames"], row["video_fps"]
    count = _outcome(check, f"row {i}", row, lambda: sampling.smart_nframes(total, native, CONFIG, **options))
    if count is not None:
        check.equal(f"row {i} {row}", count, row["out"])


def _frame_range(case: Case, check: Check, i: int, row: Row) -> None:
    total, native = row["total_frames"], row["video_fps"]
    found = _outcome(check, f"row {i}", row, lambda: sampling.frame_range(total, native, **row["ele"]))
    if found is not None:
        check.equal(f"row {i} {row}", list(found), row["out"])


def _duration_budget(case: Case, check: Check, i: int, row: Row) -> None:
    total = sampling.total_pixels(
        CONFIG, row["duration"], video_total_pixels=row["video_total_pixels"], video_count=row["num_videos"],
        adaptive=row["adaptive_enabled"],
    )  # fmt: skip
    check.equal(f"row {i} {row}", total, row["out"])


def _video_info(row: Row) -> VideoInfo:
    """A clip as the probe would describe it: `total_frames` frames at a constant rate."""
    fps = row["video_fps"]
    return VideoInfo(
        name=f"clip of {row['total_frames']} frames", format="", codec="", width=row["width"], height=row["height"],
        rotation=0, fps=fps, time_base=1 / Fraction(fps), pts=tuple(range(row["total_frames"])), exact_times=True,
        constant_rate=True, declared_duration=None,
    )  # fmt: skip


def _decoded_clip(case: Case, check: Check, i: int, row: Row) -> None:
    name, want = f"row {i} v20", row["v20"]
    options = {key: row["ele"][key] for key in (*SAMPLING, *LIMITS) if key in row["ele"]}
    plan = _outcome(check, name, want, lambda: make_plan(_video_info(row), CONFIG, **options))
    if plan is None:
        return
    check.equal(f"{name} size", [plan.height, plan.width], [want["height"], want["width"]])
    check.equal(f"{name} nframes", plan.frames, want["nframes"])
    _check_times(check, name, plan.timestamps, want["timestamps"])


def _long_clip(case: Case, check: Check, i: int, row: Row) -> None:
    name, want = f"row {i}", row["out"]
    config = dataclasses.replace(CONFIG, adaptive_budget=row["adaptive_enabled"])
    options = {key: row["ele"][key] for key in (*SAMPLING, *LIMITS) if key in row["ele"]}
    info = _video_info(row)
    plan = _outcome(check, name, want, lambda: make_plan(info, config, video_count=row["num_videos"], **options))
    if plan is None:
        return
    check.equal(f"{name} size", [plan.height, plan.width], [want["height"], want["width"]])
    check.equal(f"{name} nframes", plan.frames, want["nframes"])
    _check_times(check, name, (plan.timestamps[0], plan.timestamps[-1]), want["first_last_timestamps"])
    if "ele_video_total_pixels_after" in want:
        budget = sampling.total_pixels(
            config, row["duration"], video_total_pixels=row["ele"].get("video_total_pixels"),
            video_count=row["num_videos"],
        )  # fmt: skip
        check.equal(f"{name} budget", budget, want["ele_video_total_pixels_after"])


def _frame_list(case: Case, check: Check, i: int, row: Row) -> None:
    """Pictures that stand for a video: each is sized on its own, some are sampled, then all get the video's size."""
    name, want, ele = f"row {i} v20", row["v20"], row["ele"]
    limits = {key: ele[key] for key in LIMITS if key in ele}
    options = {key: ele[key] for key in SAMPLING if key in ele}
    native = ele.get("fps", CONFIG.fps)
    indices = _outcome(check, name, want, lambda: sampling.sample_frames(row["n_images"], native, CONFIG, **options))
    if indices is None:
        return
    height, width = sampling.listed_frame_size(row["height"], row["width"], CONFIG, **limits)
    check.equal(f"{name} frames_shape", [len(indices), 3, height, width], want["frames_shape"])
    budget = {"video_total_pixels": ele.get("video_total_pixels")}
    size = sampling.frame_size(height, width, len(indices), CONFIG, **limits, **budget)
    check.equal(f"{name} size", list(size), [want["height"], want["width"]])
    if "timestamps" in want:
        _check_times(check, name, [index / native for index in indices], want["timestamps"])
    stored = case.tensors.get(f"{i}.v20.frames")
    if stored is not None:
        pictures = case.tensors[f"{i}.input_frames"].numpy()
        for k, frame in enumerate(stored.numpy()):
            resized = resize_exactly(Image.fromarray(pictures[indices[k]]), height, width)
            _check_pixels(case, check, f"{name} frame {k}", resized, frame.transpose(1, 2, 0))


def _image_pixels(case: Case, check: Check, i: int, row: Row) -> None:
    image = _picture(case.tensors[f"{i}.in"], row.get("mode"))
    options = {**row.get("ele", {}), **{key: row[key] for key in LIMITS if key in row}}
    pixels = _outcome(check, f"row {i}", row, lambda: resize_image(image, CONFIG, **options))
    if pixels is not None:
        check.equal(f"row {i} size", list(pixels.shape[:2]), row["out_hw"])
        _check_pixels(case, check, f"row {i}", pixels, case.tensors[f"{i}.out"].numpy())


def _picture(pixels: Tensor, mode: str | None) -> Image.Image:
    """A stored array as the picture it was: in `mode` where its channels alone do not tell."""
    image = Image.fromarray(pixels.numpy())
    if mode is None or image.mode == mode:
        return image
    return Image.frombytes(mode, image.size, image.tobytes()) if len(mode) == len(image.mode) else image.convert(mode)


def _check_pixels(case: Case, check: Check, name: str, got: np.ndarray, want: np.ndarray) -> None:
    """Pixels are equal with the Pillow that made the case, else within one level."""
    allowed = 0 if PIL.__version__ == case.meta.get("pillow", PIL.__version__) else 1
    if got.shape != want.shape:
        check.equal(f"{name} shape", got.shape, want.shape)
        return
    check.equal(f"{name} pixels off by more than {allowed}", int((abs(got.astype(int) - want) > allowed).sum()), 0)


def _check_times(check: Check, name: str, got: Any, want: list[float]) -> None:
    """Seconds within the tolerance, or equal in float32, the precision in which the official code keeps them."""
    close = len(got) == len(want) and all(
        abs(a - b) <= TIMESTAMP_TOLERANCE or np.float32(a) == np.float32(b) for a, b in zip(got, want, strict=True)
    )
    check.equal(f"{name} timestamps", "equal" if close else list(got), "equal" if close else want)
