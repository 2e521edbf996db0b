"""Positions of padded batches, as the official `get_rope_index` returns them, from those of single sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keye.media.positions import PreviewLayout, build_position_ids


def get_rope_index(
    input_ids: ArrayLike,
    grids: Mapping[int, ArrayLike],
    *,
    attention_mask: ArrayLike | None = None,
    merge_size: int = 2,
    preview: PreviewLayout | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`input_ids` [B, L]; `grids` hold the rows of all sequences in order; 0 in `attention_mask` is padding. Positions
    [3, B, L], 1 at padding, and deltas [B, 1] relative to the padded length."""
    ids = np.asarray(input_ids, dtype=np.int64)
    mask = np.ones(ids.shape, dtype=bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    rows = {token: np.asarray(grid, dtype=np.int64).reshape(-1, 3) for token, grid in grids.items()}
    used = dict.fromkeys(rows, 0)
    positions = np.ones((3, *ids.shape), dtype=np.int64)
    deltas = np.zeros((len(ids), 1), dtype=np.int64)
    for b, (sequence, valid) in enumerate(zip(ids, mask, strict=True)):
        tokens, own, layout = sequence[valid], dict[int, NDArray[np.int64]](), preview
        for token, grid in rows.items():
            left = grid[used[token] :]
            if preview is not None:
                starts = np.flatnonzero(tokens[:-1] == preview.vision_start)
                own[token] = left[: int((tokens[starts + 1] == token).sum())]
            elif b == len(ids) - 1:
                own[token] = left  # so that unused rows are an error
            else:
                ends = np.cumsum(left.prod(axis=1) // merge_size**2)
                count = int((tokens == token).sum())
                own[token] = left[: int(np.searchsorted(ends, count)) + 1 if count else 0]
        if preview is not None:
            seconds: dict[int, Any] = {}
            for token, values in preview.seconds_per_frame.items():
                listed = values if isinstance(values, list | tuple) else np.asarray(values).reshape(-1)
                seconds[token] = listed[used.get(token, 0) :]
            layout = dataclasses.replace(preview, seconds_per_frame=seconds)
        positions[:, b, valid], delta = build_position_ids(tokens, own, merge_size=merge_size, preview=layout)
        used = {token: used[token] + len(own[token]) for token in rows}
        deltas[b, 0] = delta + len(tokens) - ids.shape[1]
    return positions, deltas
