"""Set `preprocess`: sizes, sampling, budgets and pixels of 1.5 and 2.0. What a file holds is read off its rows.

Preview, whose utilities are another release, is in `preprocess_preview`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import PIL
from PIL import Image
from torch import Tensor

from keye.compat import utils_1_5
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions, media_options
from keye.errors import KeyeError
from keye.media import sampling, sizes
from keye.media.image import resize_exactly, resize_image
from keye.media.info import VideoInfo
from keye.media.pixels.patches import resize_bilinear
from keye.media.pixels.slowfast import compared_size, frame_types, similarity
from keye.media.plan import VideoPlan, add_frame_types, make_plan
from tests.support.parity.cases import Case, Check, NotApplicable, is_preview

CONFIGS = {"v15": ProcessorConfig.of("1.5"), "v20": ProcessorConfig.of("2.0")}
TIMESTAMP_TOLERANCE, SIMILARITY_TOLERANCE = 1e-6, 1e-6

Row = dict[str, Any]


def run_preprocess(case: Case, check: Check) -> None:
    if is_preview(case.meta):
        from tests.support.parity.preprocess_preview import run_preview

        run_preview(case, check)
        return
    if "threshold" in case.meta:
        _frame_typing(case, check)
        return
    run_row = _row_function(case.meta)
    for i, row in enumerate(case.meta["cases"]):
        run_row(case, check, i, row)


def _row_function(meta: Row) -> Callable[[Case, Check, int, Row], None]:
    """The comparison for the rows of a file, chosen by their fields."""
    row, what = meta["cases"][0], str(meta["what"])
    fields = set(row)
    if {"factor", "min_pixels", "max_pixels"} <= fields:
        return _smart_resize
    if {"ele", "total_frames", "frame_types"} <= fields:
        return _slow_fast_budget
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
        return _smart_nframes_1_5 if "1.5" in what else _smart_nframes_2_0
    if "out_hw" in fields:
        return _image_pixels
    raise NotApplicable(f"rows with fields {', '.join(sorted(fields))} are unknown to this version")


def official_options(ele: Row, kind: str = "video", **more: Any) -> MediaOptions:
    """The options of a recorded element, with the official behaviour where ours is better."""
    known = {key: value for key, value in ele.items() if key not in ("type", "image", "image_url", "video")}
    return media_options(kind, {**known, "strict_official": True}, **more)  # type: ignore[arg-type]


def outcome(check: Check, name: str, row: Row, run: Callable[[], Any]) -> Any:
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
    size = outcome(check, f"row {i}", row, lambda: sizes.smart_resize(row["height"], row["width"], **options))
    if size is not None:
        check.equal(f"row {i} {row}", list(size), row["out"])


def _smart_nframes_1_5(case: Case, check: Check, i: int, row: Row) -> None:
    nframes_row(check, i, row, CONFIGS["v15"])


def _smart_nframes_2_0(case: Case, check: Check, i: int, row: Row) -> None:
    nframes_row(check, i, row, CONFIGS["v20"])


def nframes_row(check: Check, i: int, row: Row, config: ProcessorConfig) -> None:
    total, native = row["total_frames"], row["video_fps"]
    count = outcome(
        check, f"row {i}", row, lambda: sampling.smart_nframes(total, native, config, official_options(row["ele"]))
    )
    if count is not None:
        check.equal(f"row {i} {row}", count, row["out"])


def _frame_range(case: Case, check: Check, i: int, row: Row) -> None:
    total, native = row["total_frames"], row["video_fps"]
    result = outcome(check, f"row {i}", row, lambda: sampling.find_frame_range(total, native, **row["ele"]))
    if result is not None:
        check.equal(f"row {i} {row}", list(result), row["out"])


def _duration_budget(case: Case, check: Check, i: int, row: Row) -> None:
    options = MediaOptions(video_total_pixels=row["video_total_pixels"], video_count=row["num_videos"])
    total = sizes.compute_total_pixels(
        CONFIGS["v20"], row["duration"], options.replace(adaptive_budget=row["adaptive_enabled"])
    )
    check.equal(f"row {i} {row}", total, row["out"])


def video_info(row: Row) -> VideoInfo:
    """A clip as the probe would describe it: `total_frames` frames at a constant rate."""
    fps = row["video_fps"]
    return VideoInfo(
        name=f"clip of {row['total_frames']} frames", format="", codec="", width=row["width"], height=row["height"],
        rotation=0, fps=fps, time_base=1 / Fraction(fps), pts=tuple(range(row["total_frames"])), exact_times=True,
        constant_rate=True, declared_duration=None,
    )  # fmt: skip


def _frame_typing(case: Case, check: Check) -> None:
    """Slow and fast frames of a stored clip: the size they are compared at, its pixels, similarities and types."""
    meta, config = case.meta, CONFIGS["v15"]
    frames = [np.ascontiguousarray(frame) for frame in case.tensors["frames"].numpy().transpose(0, 2, 3, 1)]
    size = compared_size(frames[0].shape[0], frames[0].shape[1], config)
    check.equal("resized_hw", list(size), meta["resized_hw"])
    resized = [resize_bilinear(frame, size) for frame in frames]
    if "resized_first" in case.tensors:
        first = case.tensors["resized_first"].numpy().transpose(1, 2, 0)
        check.equal("resized_first", int((resized[0] != first).sum()), 0)
    for i, reference in enumerate(case.tensors["ref_index"].tolist()):
        want = float(case.tensors["sim"][i])
        if i == 0:
            continue
        got = similarity(resized[reference], resized[i])
        same = np.isnan(got) if np.isnan(want) else abs(got - want) <= SIMILARITY_TOLERANCE
        check.equal(f"similarity {i}", "equal" if same else str(got), "equal" if same else str(want))
    check.equal("frame_types", frame_types(frames, config, meta["threshold"]), case.tensors["frame_types"].tolist())


def _slow_fast_budget(case: Case, check: Check, i: int, row: Row) -> None:
    _check_slow_fast(check, f"row {i}", row, row["out"])


def _decoded_clip(case: Case, check: Check, i: int, row: Row) -> None:
    _check_slow_fast(check, f"row {i} v15", row, row["v15"])
    name, want = f"row {i} v20", row["v20"]
    plan = outcome(check, name, want, lambda: make_plan(video_info(row), CONFIGS["v20"], official_options(row["ele"])))
    if plan is None:
        return
    check.equal(f"{name} size", [plan.height, plan.width], [want["height"], want["width"]])
    check.equal(f"{name} nframes", plan.frames, want["nframes"])
    _check_times(check, name, plan.timestamps, want["timestamps"])


def _check_slow_fast(check: Check, name: str, row: Row, want: Row) -> None:
    """1.5: sizes of slow and fast frames and their times, with the recorded frame types as input."""
    options = official_options(row["ele"])

    def planned() -> VideoPlan:
        plan = make_plan(video_info(row), CONFIGS["v15"], options)
        return add_frame_types(plan, want["frame_types"], CONFIGS["v15"], options)

    plan = outcome(check, name, want, planned)
    if plan is None:
        return
    assert plan.fast is not None
    check.equal(f"{name} slow", [plan.height, plan.width], [want["height"], want["width"]])
    check.equal(f"{name} fast", [plan.fast.height, plan.fast.width], [want["fast_height"], want["fast_width"]])
    check.equal(f"{name} frames", plan.frames, len(want["frame_types"]))
    _check_times(check, name, plan.timestamps, want["timestamps"])


def _long_clip(case: Case, check: Check, i: int, row: Row) -> None:
    name, want = f"row {i}", row["out"]
    config = dataclasses.replace(CONFIGS["v20"], adaptive_budget=row["adaptive_enabled"])
    options = official_options(row["ele"], video_count=row["num_videos"])
    plan = outcome(check, name, want, lambda: make_plan(video_info(row), config, options))
    if plan is None:
        return
    check.equal(f"{name} size", [plan.height, plan.width], [want["height"], want["width"]])
    check.equal(f"{name} nframes", plan.frames, want["nframes"])
    _check_times(check, name, (plan.timestamps[0], plan.timestamps[-1]), want["first_last_timestamps"])
    if "ele_video_total_pixels_after" in want:
        budget = sizes.compute_total_pixels(config, row["duration"], options)
        check.equal(f"{name} budget", budget, want["ele_video_total_pixels_after"])


def _frame_list(case: Case, check: Check, i: int, row: Row) -> None:
    """Pictures that stand for a video: each is sized on its own, some are sampled, then all get the video's size."""
    for version, config in CONFIGS.items():
        name, want = f"row {i} {version}", row[version]
        options, native = official_options(row["ele"]), row["ele"].get("fps", config.fps)
        indices = outcome(
            check,
            name,
            want,
            lambda: sampling.sample_frames(row["n_images"], native, config, options),  # noqa: B023
        )
        if indices is None:
            continue
        height, width = sizes.compute_listed_frame_size(row["height"], row["width"], config, options)
        check.equal(f"{name} frames_shape", [len(indices), 3, height, width], want["frames_shape"])
        fast = sum(want["frame_types"])
        result = sizes.compute_frame_sizes(height, width, len(indices) - fast, config, options, fast=fast)
        check.equal(f"{name} slow", list(result.slow), [want["height"], want["width"]])
        check.equal(f"{name} fast", list(result.fast), [want["fast_height"], want["fast_width"]])
        if "timestamps" in want:
            _check_times(check, name, [index / native for index in indices], want["timestamps"])
        if f"{i}.{version}.frames" in case.tensors:
            _listed_pixels(case, check, i, row, version, indices, (height, width))


def _listed_pixels(
    case: Case, check: Check, i: int, row: Row, version: str, indices: list[int], size: sizes.Size
) -> None:
    name, stored = f"row {i} {version}", case.tensors[f"{i}.{version}.frames"].numpy()
    pictures = [Image.fromarray(frame) for frame in case.tensors[f"{i}.input_frames"].numpy()]
    for k, frame in enumerate(stored):
        resized = resize_exactly(pictures[indices[k]], *size)
        check_pixels(case, check, f"{name} frame {k}", resized, frame.transpose(1, 2, 0))
    if version == "v15":
        frames, facts = utils_1_5.fetch_video({"video": pictures, **row["ele"], "strict_official": True})
        check.equal(f"{name} utilities", facts["frame_types"].tolist(), row["v15"]["frame_types"])
        check.equal(f"{name} utilities shape", list(frames.shape), row["v15"]["frames_shape"])


def _image_pixels(case: Case, check: Check, i: int, row: Row) -> None:
    image = picture(case.tensors[f"{i}.in"], row.get("mode"))
    limits = {key: row[key] for key in ("min_pixels", "max_pixels") if key in row}
    options = official_options({**row.get("ele", {}), **limits}, "image")
    pixels = outcome(check, f"row {i}", row, lambda: resize_image(image, CONFIGS["v20"], options))
    if pixels is not None:
        check.equal(f"row {i} size", list(pixels.shape[:2]), row["out_hw"])
        check_pixels(case, check, f"row {i}", pixels, case.tensors[f"{i}.out"].numpy())


def picture(pixels: Tensor, mode: str | None) -> Image.Image:
    """A stored array as the picture it was: in `mode` where its channels alone do not tell."""
    image = Image.fromarray(pixels.numpy())
    if mode is None or image.mode == mode:
        return image
    return Image.frombytes(mode, image.size, image.tobytes()) if len(mode) == len(image.mode) else image.convert(mode)


def check_pixels(case: Case, check: Check, name: str, got: np.ndarray, want: np.ndarray) -> None:
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
