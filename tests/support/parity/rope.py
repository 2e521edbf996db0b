"""Set `rope`: M-RoPE positions of prompts, and the rotation itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.media.positions import PreviewLayout, build_position_ids, split_grid_rows
from keye.ops.elementwise import rotate
from keye.ops.reference import inverse_frequencies, rope_angles
from tests.support.parity.cases import Case, Check, NotApplicable, is_preview
from tests.support.positions import get_rope_index

#: Placeholder ids of cases that do not state their own.
TOKEN_IDS = {"vision_start": 500, "image": 502, "video": 503, "fast_video": 504}
#: An official function that stops on a name it never defined has no result to agree with.
DEFECTS = ("NameError", "UnboundLocalError", "AttributeError")


def run_rope(case: Case, check: Check) -> None:
    meta = case.meta
    if "mrope_section" in meta:
        _check_rotation(case, check)
    elif "video_grid_thw_merged" in case.tensors:
        _check_merged_rows(case, check)
    elif is_preview(meta) or meta.get("function") in ("keye", "adaptive", "slowfast"):
        _check_positions(case, check)
    else:
        raise NotApplicable(f"position function {meta.get('function')!r} is unknown to this version")


def _grids(case: Case) -> dict[int, np.ndarray]:
    token_ids = case.meta.get("token_ids") or TOKEN_IDS
    kinds = ("image", "video", "fast_video")
    return {token_ids[k]: t.numpy() for k in kinds if (t := case.tensors.get(f"{k}_grid_thw")) is not None}


def _check_positions(case: Case, check: Check) -> None:
    ids, mask = case.tensors["input_ids"].numpy(), case.tensors.get("attention_mask")
    options: dict[str, Any] = {"merge_size": case.meta.get("spatial_merge_size", 2)}
    if is_preview(case.meta):
        options["preview"] = _preview_layout(case)
    error = case.meta.get("error")
    # get_rope_index_keye gives every sequence of a batch all grid rows; the others count a sequence's own.
    by_row = case.meta["function"] == "keye"
    try:
        if by_row:
            positions, deltas = _row_by_row(ids, _grids(case), None if mask is None else mask.numpy(), **options)
        else:
            positions, deltas = get_rope_index(ids, _grids(case), attention_mask=mask, **options)
    except KeyeError as raised:
        check.equal("error", f"{type(raised).__name__}: {raised}" if not error else "raised", "raised")
        return
    if error:
        if str(error).startswith(DEFECTS):
            raise NotApplicable(f"the official function stops on its own defect here ({error}); keye gives positions")
        check.fail("error", f"positions were returned where the official function raises {error}")
    check.equal("position_ids", positions, case.tensors["position_ids"])
    if "mrope_position_deltas" in case.tensors:
        check.equal("mrope_position_deltas", deltas, case.tensors["mrope_position_deltas"].view(-1, 1))


def _preview_layout(case: Case) -> PreviewLayout:
    """Rates lie in a tensor or, where they were a Python list, in the json; without any, a frame lasts a second."""
    token_ids = case.meta.get("token_ids") or TOKEN_IDS
    seconds = case.tensors.get("second_per_grid_ts")
    rates = case.meta.get("second_per_grid_ts_list") if seconds is None else seconds.tolist()
    return PreviewLayout(
        vision_start=token_ids["vision_start"],
        seconds_per_frame={token_ids["video"]: rates or ()},
        tokens_per_second=case.meta.get("tokens_per_second", 2),
    )


def _row_by_row(
    ids: np.ndarray, grids: dict[int, np.ndarray], mask: np.ndarray | None, merge_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each sequence on its own, placed back between the padding."""
    valid = np.ones(ids.shape, dtype=bool) if mask is None else mask.astype(bool)
    positions = np.ones((3, *ids.shape), dtype=np.int64)
    deltas = np.zeros((len(ids), 1), dtype=np.int64)
    for b in range(len(ids)):
        own, delta = build_position_ids(ids[b][valid[b]], grids, merge_size=merge_size)
        positions[:, b, valid[b]] = own
        deltas[b, 0] = delta + valid[b].sum() - ids.shape[1]
    return positions, deltas


def _check_merged_rows(case: Case, check: Check) -> None:
    """Rows (t, h, w) that stand for several frames are split before positions are made."""
    tensors, token_ids = case.tensors, case.meta.get("token_ids") or TOKEN_IDS
    rows = split_grid_rows(tensors["video_grid_thw_merged"])
    check.equal("video_grid_thw_per_frame", rows, tensors["video_grid_thw_per_frame"])
    grids = {token_ids["video"]: rows}
    if "image_grid_thw" in tensors:
        grids[token_ids["image"]] = tensors["image_grid_thw"].numpy()
    positions, delta = build_position_ids(tensors["input_ids"].numpy(), grids)
    check.equal("position_ids", positions, tensors["position_ids"])
    check.equal("mrope_position_delta", delta, int(tensors["mrope_position_delta"]))


def _check_rotation(case: Case, check: Check) -> None:
    meta, tensors, tolerance = case.meta, case.tensors, case.tolerance(1e-5)
    dim, section = meta["head_dim"], tuple(meta["mrope_section"])
    inv_freq = inverse_frequencies(dim, meta["rope_theta"])

    def rotated(name: str, positions: Tensor) -> Tensor:
        cos, sin = rope_angles(positions, inv_freq, section)
        return rotate(tensors[name].unflatten(-1, (-1, dim)), cos, sin).flatten(1)

    for name in ("q", "k"):
        check.close(f"{name}_out", rotated(name, tensors["positions"]), tensors[f"{name}_out"], tolerance)
        if f"{name}_out_text" in tensors:
            text = rotated(name, tensors["text_positions"].expand(3, -1))
            check.close(f"{name}_out_text", text, tensors[f"{name}_out_text"], tolerance)
    if "cos_sin_cache_head" in tensors:
        cache = tensors["cos_sin_cache_head"]
        cos, sin = rope_angles(torch.arange(len(cache)).expand(3, -1), inv_freq, section)
        check.close("cos_sin_cache_head", torch.cat((cos, sin), dim=1), cache, tolerance)
