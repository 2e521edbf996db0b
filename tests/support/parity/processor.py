"""Set `processor`: prompts of Preview and 1.5 with their placeholders grown, token ids, grids, rates and patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from keye.chat.messages import Medium
from keye.chat.template import CHATML, PREVIEW_CHATML
from keye.chat.tokenizer import Tokenizer
from keye.compat.processor import OfficialProcessor, ProcessorOutput
from keye.config import ProcessorConfig
from keye.media.pixels.patches import VisionInput
from tests.support.parity.cases import Case, Check, NotApplicable
from tests.support.parity.preprocess import Row, outcome, picture

PREVIEW_LIMITS = {"processor_min_pixels": 3136, "processor_max_pixels": 1_003_520}
PATCH_TOLERANCE, OTHER_PILLOW_TOLERANCE, RATE_TOLERANCE = 1e-5, 2e-2, 1e-6
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
#: Where the official tokenizer of Preview may lie in or above the folder of recorded cases, or beside the checkout.
TOKENIZERS = tuple(Path(*parts) / "keye-vl-8b-preview" for parts in ((), ("checkpoints",), ("shared", "checkpoints")))


def run_processor(case: Case, check: Check) -> None:
    if "cases" not in case.meta:
        _slow_fast_call(case, check)
        return
    run_row = _row_function(case.meta["cases"][0])
    for i, row in enumerate(case.meta["cases"]):
        if not str(row.get("name", "")).startswith("QUIRK"):  # the recorded faults of reading flat images sideways
            run_row(case, check, i, row)


def _row_function(row: Row) -> Callable[[Case, Check, int, Row], None]:
    """The comparison for the rows of a file, chosen by the fields of the first."""
    fields = set(row)
    for wanted, function in (
        ({"expanded"}, _expansion),
        ({"rendered"}, _template),
        ({"decoded"}, _tokens),
        ({"processor_overrides"}, _call),
        ({"video_grid_thw", "kw"}, _video_patches),
        ({"height", "width", "kw"}, _image_patches),
    ):
        if wanted <= fields:
            return function
    raise NotApplicable(f"rows with fields {', '.join(sorted(fields))} are unknown to this version")


# --------------------------------------------------------------------------------------------------------------------
# Text


def _expansion(case: Case, check: Check, i: int, row: Row) -> None:
    """Placeholders alone: pictures of the recorded grids, whatever they show."""
    processor = _processor()
    grids = {kind: row[f"{kind}_grid_thw"] or [] for kind in ("image", "video")}
    media = {kind: [_blank(*grid) for grid in rows] for kind, rows in grids.items()}
    output = _WithoutResize(processor.config)(row["text"], media["image"], media["video"])
    check.equal(f"row {i} text", output.text, row["expanded"])
    check.equal(f"row {i} layout", [_runs_of_text(text) for text in output.text], row["layout_run_length"])


class _WithoutResize(OfficialProcessor):
    """The recorded grids were given to the official processor by a stand-in, so nothing is resized here either."""

    def image(self, image: Any) -> VisionInput:
        return image

    def video(self, video: Any) -> VisionInput:
        return video


def _blank(t: int, h: int, w: int) -> VisionInput:
    grid = np.array([[1, h, w]] * t, dtype=np.int64)
    return VisionInput(np.zeros((int(t * h * w), 3, 14, 14), dtype=np.float32), grid)


def _runs_of_text(text: str) -> list[list[Any]]:
    """[piece, count] where every added token is a piece, and so is the text between two of them."""
    pieces: list[str] = []
    rest = text
    while rest:
        start = rest.find("<|")
        if start < 0:
            pieces.append(rest)
            break
        end = rest.index("|>", start) + 2
        pieces += [piece for piece in (rest[:start], rest[start:end]) if piece]
        rest = rest[end:]
    return [[piece, len(list(same))] for piece, same in groupby(pieces)]


def _template(case: Case, check: Check, i: int, row: Row) -> None:
    """The prompt of a conversation by our own template, which must be the official text; where keye demands more order
    of a conversation than the official template, it must refuse."""
    kwargs = {key: value for key, value in row["kwargs"].items() if key not in ("enable_thinking", "tools")}
    preview = "informative" not in case.meta
    template = PREVIEW_CHATML if preview else CHATML
    batch = isinstance(row["rendered"], list)
    talks = row["conversation"] if batch else [row["conversation"]]
    texts, ids = ([row.get(name)] if not batch else row[name] for name in ("rendered", "input_ids"))
    for talk, text, wanted in zip(talks, texts, ids, strict=True):
        if reason := _disorder(talk):
            outcome(check, f"row {i} ({reason})", {"error": reason}, lambda: template.render(talk))  # noqa: B023
            continue
        segments = template.render(talk, thinking=row["kwargs"].get("enable_thinking"), **kwargs)
        parts = [
            (PADS[part.kind], True) if isinstance(part.value, Medium) else (part.value, part.kind == "template")
            for part in segments
        ]
        check.equal(f"row {i} text", "".join(part for part, _ in parts), text)
        if wanted is not None and not _forged(talk):
            check.equal(f"row {i} ids", _tokenizer(case).encode_parts(parts), wanted)


def _disorder(talk: list[Row]) -> str | None:
    """Why keye refuses a conversation that the official template takes in silence."""
    if any(turn["role"] not in ("system", "user", "assistant") for turn in talk):
        return "a role without meaning"
    for turn in talk:
        for part in turn["content"] if isinstance(turn["content"], list) else []:
            kind = part.get("type")
            named = {"text": {"text"}, "image": {"image"}, "image_url": {"image_url"}, "video": {"video"}}
            if kind not in named or set(part) - {"type"} != named[kind]:
                return "a part that does not say what it is"
    return None


def _forged(talk: list[Row]) -> bool:
    """Whether a user's words hold special tokens, which officially become tokens and in keye stay text."""
    return any("<|" in str(turn["content"]) for turn in talk)


def _tokens(case: Case, check: Check, i: int, row: Row) -> None:
    tokenizer = _tokenizer(case)
    ids = tokenizer.encode(row["text"], special=True)
    check.equal(f"row {i} ids", ids, row["input_ids"])
    check.equal(f"row {i} text", tokenizer.decode(ids, skip_special=False), row["decoded"])
    check.equal(f"row {i} visible text", tokenizer.decode(ids), row["decoded_skip_special"])


def _tokenizer(case: Case) -> Tokenizer:
    return load_tokenizer(case.path.resolve().parents[1])


@cache
def load_tokenizer(golden: Path) -> Tokenizer:
    """The official tokenizer of Preview, found in or above the folder `golden` of recorded cases or of this file."""
    for above in (golden, *golden.parents, *Path(__file__).resolve().parents):
        for place in TOKENIZERS:
            if (above / place / "tokenizer.json").exists():
                return Tokenizer.from_file(above / place)
    raise NotApplicable(f"the tokenizer of Preview is not here; put it at {golden.parent / TOKENIZERS[1]}")


# --------------------------------------------------------------------------------------------------------------------
# Calls


def _processor(**changes: Any) -> OfficialProcessor:
    limits = {f"processor_{k}" if k in ("min_pixels", "max_pixels") else k: v for k, v in changes.items()}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in limits.items()}
    return OfficialProcessor(ProcessorConfig.of("preview", **{**PREVIEW_LIMITS, **values}))


def _call(case: Case, check: Check, i: int, row: Row) -> None:
    """The whole processor: text, images and videos to ids, masks, grids, rates and patches."""
    name = f"row {i} {row['name']}"
    processor = _processor(**row["processor_overrides"])
    images = [picture(case.tensors[f"{i}.image_{k}"], mode) for k, mode in enumerate(row.get("images", []))]
    videos = [_video(case.tensors[f"{i}.video_{k}"], kind) for k, kind in enumerate(row.get("videos", []))]
    options = {key: value for key, value in row["kwargs"].items() if key == "fps"}
    output = outcome(check, name, row, lambda: processor(row["text"], images, videos, **options))
    if output is None:
        return
    _check_ids(case, check, name, row, output)
    for field in ("image_grid_thw", "video_grid_thw"):
        check.equal(f"{name} {field}", _listed(getattr(output, field)), row.get(field))
    rates, wanted = output.second_per_grid_ts or (), row.get("second_per_grid_ts", [])
    near = len(rates) == len(wanted) and np.allclose(rates, wanted, rtol=RATE_TOLERANCE, atol=0)
    check.equal(f"{name} second_per_grid_ts", near, True)
    for field in ("pixel_values", "pixel_values_videos"):
        _check_patches(case, check, name, row, field, getattr(output, field), case.tensors.get(f"{i}.{field}"))


def _check_ids(case: Case, check: Check, name: str, row: Row, output: ProcessorOutput) -> None:
    """Token ids and mask, padded on the side that the recorded mask shows."""
    tokenizer = _tokenizer(case)
    for k, (text, runs) in enumerate(zip(output.text, row["input_ids_run_length"], strict=True)):
        mask = [value for value, count in row["attention_mask_run_length"][k] for _ in range(count)]
        ids = [value for value, count in runs for _ in range(count)]
        remaining = [token for token, valid in zip(ids, mask, strict=True) if valid]
        check.equal(f"{name} ids of text {k}", tokenizer.encode(text, special=True), remaining)


def _check_patches(
    case: Case, check: Check, name: str, row: Row, field: str, got: np.ndarray | None, stored: Tensor | None
) -> None:
    """All patches where they are stored, else their shape and sum."""
    tolerance = PATCH_TOLERANCE if f"Pillow {PIL.__version__}" in _environment(case) else OTHER_PILLOW_TOLERANCE
    if stored is not None and got is not None:
        check.close(f"{name} {field}", torch.from_numpy(got), stored, tolerance)
    elif f"{field}_shape" in row and got is not None:
        check.equal(f"{name} {field} shape", list(got.shape), row[f"{field}_shape"])
        mean_error = abs(float(got.astype(np.float64).sum()) - row[f"{field}_sum"]) / got.size
        check.equal(f"{name} {field} mean error {mean_error:.3g} is small", mean_error <= tolerance, True)
    else:
        check.equal(f"{name} {field} given", got is not None, f"{field}_dtype" in row)


def _environment(case: Case) -> str:
    return str(case.meta.get("environment", f"Pillow {PIL.__version__}"))


def _video(frames: Tensor, kind: str) -> Any:
    if kind == "tensor":
        return frames.permute(0, 3, 1, 2).float()
    return [Image.fromarray(frame) for frame in frames.numpy()] if kind == "pil" else frames.numpy()


def _listed(grid: np.ndarray | None) -> list[list[int]] | None:
    return None if grid is None else grid.tolist()


def _image_patches(case: Case, check: Check, i: int, row: Row) -> None:
    """The image processor on one picture; without a stored picture only its grid."""
    processor, stored = _processor(**row["kw"]), case.tensors.get(f"{i}.image")
    if stored is None:
        image = Image.new("RGB", (row["width"], row["height"]))
    else:
        # A palette picture is stored as its colours.
        image = picture(stored, None if row["mode"] == "P" else row["mode"])
    vision = outcome(check, f"row {i}", row, lambda: processor.image(image))
    if vision is not None:
        check.equal(f"row {i} grid", vision.grid_thw[0].tolist(), row["grid_thw"])
        if stored is not None:
            want = case.tensors[f"{i}.pixel_values"]
            _check_patches(case, check, f"row {i}", row, "pixel_values", vision.pixel_values, want)


def _video_patches(case: Case, check: Check, i: int, row: Row) -> None:
    """The image processor on videos: one for each stored array with four axes, or one of the single frames."""
    arrays = [case.tensors[name] for name in sorted(case.tensors) if name.startswith(f"{i}.frames_")]
    videos = arrays if arrays[0].ndim == 4 else [[Image.fromarray(frame.numpy()) for frame in arrays]]
    processor = _processor(**row["kw"])
    output = processor("<|video_pad|>" * len(videos), videos=[_as_numpy(video) for video in videos])
    check.equal(f"row {i} grids", _listed(output.video_grid_thw), row["video_grid_thw"])
    want = case.tensors[f"{i}.pixel_values_videos"]
    _check_patches(case, check, f"row {i}", row, "pixel_values_videos", output.pixel_values_videos, want)


def _as_numpy(video: Any) -> Any:
    return video.numpy() if isinstance(video, Tensor) else video


def _slow_fast_call(case: Case, check: Check) -> None:
    """1.5: one call with the settings of `process_vision_info`."""
    meta, params = case.meta, case.meta["processor_params"]
    config = ProcessorConfig.of("1.5", image_mean=tuple(params["mean"]), image_std=tuple(params["std"]))
    names = sorted(name for name in case.tensors if name.startswith("frames_"))
    output = OfficialProcessor(config)(meta["text"], videos=[case.tensors[n] for n in names], **meta["kwargs"])
    check.equal("text", output.text, meta["expanded"])
    check.equal("layout", [_runs_of_text(text) for text in output.text], meta["layout_run_length"])
    check.equal("video_grid_thw", output.video_grid_thw, case.tensors["video_grid_thw"])
    # One recorded number for a single video, one for each of several.
    check.equal("num_frames", list(output.num_frames or ()), case.tensors["num_frames"].tolist())
    stored = case.tensors["pixel_values_videos"]
    assert output.pixel_values_videos is not None
    check.close("patches", torch.from_numpy(output.pixel_values_videos[: len(stored)]), stored, PATCH_TOLERANCE)
