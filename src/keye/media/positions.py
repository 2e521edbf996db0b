"""Positions of a prompt's tokens on the three axes of M-RoPE: time, row, column. Numpy only.

Rule of Keye-VL 1.5 and 2.0: text counts up by one on all axes. A grid row (t, h, w) of an image or of one video frame
starts at base = everything before + 1 and spans base + (time, row, column) over its merged grid; the next token
continues at the largest position + 1. No axis holds absolute time. Source: `get_rope_index_keye`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keye.errors import KeyeError

IntArray = NDArray[np.int64]


def split_grid_rows(grid_thw: ArrayLike) -> IntArray:
    """One row per frame: every (t, h, w) becomes t rows (1, h, w). [n, 3] -> [sum of t, 3], int64."""
    grid = _as_grid(grid_thw)
    rows = np.repeat(grid, grid[:, 0], axis=0)
    rows[:, 0] = 1
    return rows


def build_position_ids(
    token_ids: ArrayLike, grids: Mapping[int, ArrayLike], *, merge_size: int = 2
) -> tuple[IntArray, int]:
    """Positions of one sequence without padding.

    Args:
        token_ids: [L] integers.
        grids: placeholder token id -> grid rows [n, 3] (t, h, w in patches) of that kind of medium in order of
            appearance. A video has one row per frame, (1, h, w).
        merge_size: patches merged into one token along each side.

    Returns:
        position_ids [3, L] int64 (rows: time, row, column) and delta = largest position + 1 - L, to be added to the
        sequence length to get the position of the next token.

    Raises:
        KeyeError: the placeholders of a kind are not as many as its grids make, or text interrupts a grid row.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    length = ids.shape[0]
    starts, shapes = _segments(ids, grids, merge_size)
    sizes = shapes.prod(axis=1)
    # The counter grows by 1 at each text token and, at the first token of a row, by the row's longest side.
    step = np.ones(length, dtype=np.int64)
    inside = np.repeat(starts, sizes) + _local_index(sizes)
    step[inside] = 0
    step[starts] = shapes.max(axis=1, initial=0)
    base = np.cumsum(step) - step
    positions = np.broadcast_to(base, (3, length)).copy()
    _, h, w = np.repeat(shapes, sizes, axis=0).T
    local = _local_index(sizes)
    offsets = np.stack([local // (h * w), local // w % h, local % w])
    positions[:, inside] = np.repeat(base[starts], sizes) + offsets
    return positions, int(step.sum()) - length


def get_rope_index(
    input_ids: ArrayLike,
    grids: Mapping[int, ArrayLike],
    *,
    attention_mask: ArrayLike | None = None,
    merge_size: int = 2,
) -> tuple[IntArray, IntArray]:
    """Positions of a padded batch.

    Args:
        input_ids: [B, L] integers.
        grids: as in `build_position_ids`, the rows of all sequences one after the other.
        attention_mask: [B, L], 0 marks padding on either side; None means no padding.

    Returns:
        position_ids [3, B, L] int64, 1 at padding, and deltas [B, 1] int64 relative to the padded length L.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    mask = np.ones(ids.shape, dtype=bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    rows = {token: _as_grid(grid) for token, grid in grids.items()}
    used = dict.fromkeys(rows, 0)
    positions = np.ones((3, *ids.shape), dtype=np.int64)
    deltas = np.zeros((ids.shape[0], 1), dtype=np.int64)
    last = ids.shape[0] - 1
    for b, (sequence, valid) in enumerate(zip(ids, mask, strict=True)):
        kept = sequence[valid]
        own = {}
        for token, grid in rows.items():
            rest = grid[used[token] :]
            # The last sequence takes all rows left, so that rows nobody used are an error.
            own[token] = rest if b == last else rest[: _rows_needed(kept, token, rest, merge_size)]
            used[token] += len(own[token])
        sequence_positions, delta = build_position_ids(kept, own, merge_size=merge_size)
        positions[:, b, valid] = sequence_positions
        deltas[b, 0] = delta + len(kept) - ids.shape[1]
    return positions, deltas


def _rows_needed(ids: IntArray, token: int, grid: IntArray, merge_size: int) -> int:
    """How many leading rows of `grid` cover the placeholders of this sequence."""
    count = int((ids == token).sum())
    ends = np.cumsum(_merged_shapes(grid, merge_size).prod(axis=1))
    return int(np.searchsorted(ends, count, side="left")) + 1 if count else 0


def _segments(ids: IntArray, grids: Mapping[int, ArrayLike], merge_size: int) -> tuple[IntArray, IntArray]:
    """First token and merged shape of every grid row, in order of appearance: [n] and [n, 3]."""
    all_starts = [np.empty(0, dtype=np.int64)]
    all_shapes = [np.empty((0, 3), dtype=np.int64)]
    for token, grid in grids.items():
        shapes = _merged_shapes(_as_grid(grid), merge_size)
        sizes = shapes.prod(axis=1)
        places = np.flatnonzero(ids == token)
        if len(places) != sizes.sum():
            raise KeyeError(
                f"the prompt has {len(places)} placeholders {token} but its {len(shapes)} grid rows make "
                f"{int(sizes.sum())} visual tokens; give each medium exactly its own placeholders"
            )
        first = np.cumsum(sizes) - sizes
        if np.any(places[first + sizes - 1] - places[first] != sizes - 1):
            raise KeyeError(
                f"other tokens stand between placeholders {token} of one grid row; "
                "split video grids into one row per frame (split_grid_rows)"
            )
        all_starts.append(places[first])
        all_shapes.append(shapes)
    starts, shapes = np.concatenate(all_starts), np.concatenate(all_shapes)
    order = np.argsort(starts)
    return starts[order], shapes[order]


def _as_grid(grid: ArrayLike) -> IntArray:
    array = np.asarray(grid, dtype=np.int64).reshape(-1, 3)
    if (array < 1).any():
        raise KeyeError("a grid row holds a number below 1; rows are (t, h, w) in patches")
    return array


def _merged_shapes(grid: IntArray, merge_size: int) -> IntArray:
    if (grid[:, 1:] % merge_size).any():
        raise KeyeError(f"a grid row has a side that is no multiple of merge_size={merge_size}")
    return grid // np.array([1, merge_size, merge_size])


def _local_index(sizes: IntArray) -> IntArray:
    """0..size-1 for each size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)
