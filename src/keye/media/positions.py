"""Positions of a prompt's tokens on the three axes of M-RoPE: time, row, column. Numpy only.

Text counts up by one on all axes. A grid row (t, h, w) of a medium starts at base = everything before + 1 and spans
base + (time, row, column) over its merged grid; the next token continues at the largest position + 1.

Keye-VL 1.5 and 2.0 place each video frame like an image; no axis holds absolute time (source: `get_rope_index_keye`).
Preview has one grid row for a whole video, whose time axis counts `tokens_per_second` a second (source:
`KeyeForConditionalGeneration.get_rope_index`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keye.errors import KeyeError

IntArray = NDArray[np.int64]
Grids = Mapping[int, ArrayLike]
#: Grid rows of one sequence in order of appearance: first token [n], merged shape [n, 3], and for each row its frames'
#: offsets on the time axis.
_Blocks = tuple[IntArray, IntArray, list[IntArray]]
#: Of each video the seconds between two frames, or where they are uneven the seconds of every frame from the first on.
FrameSeconds = Sequence[float | Sequence[float]]


@dataclass(frozen=True)
class PreviewLayout:
    """What Preview needs to know beyond tokens and grids.

    vision_start: the token before each medium. Placeholders beyond the media that one announces are plain text.
    seconds_per_frame: placeholder id -> seconds between two frames, one number for each grid row of that kind; 1 second
        for a row without a number. Where frames are unevenly spaced, a list of every frame's seconds stands instead of
        the number. Give it for videos only: all frames of an image share one time.
    tokens_per_second: steps of the time axis in one second.
    """

    vision_start: int
    seconds_per_frame: Mapping[int, ArrayLike | FrameSeconds] = field(default_factory=dict)
    tokens_per_second: float = 2.0


def split_grid_rows(grid_thw: ArrayLike) -> IntArray:
    """One row per frame: every (t, h, w) becomes t rows (1, h, w). [n, 3] -> [sum of t, 3], int64."""
    grid = _as_grid(grid_thw)
    rows = np.repeat(grid, grid[:, 0], axis=0)
    rows[:, 0] = 1
    return rows


def frame_times(frames: int, seconds_per_frame: float, tokens_per_second: float) -> IntArray:
    """Preview's time index of each frame, [frames]: int(frame * seconds_per_frame * tokens_per_second), both products
    rounded to float32 in this order before the fraction is cut off, as the official code has it."""
    seconds = np.arange(frames, dtype=np.float32) * np.float32(seconds_per_frame)
    return (seconds * np.float32(tokens_per_second)).astype(np.int64)


def build_position_ids(
    token_ids: ArrayLike, grids: Grids, *, merge_size: int = 2, preview: PreviewLayout | None = None
) -> tuple[IntArray, int]:
    """Positions of one sequence without padding.

    Args:
        token_ids: [L] integers.
        grids: placeholder token id -> grid rows [n, 3] (t, h, w in patches) of that kind of medium in order of
            appearance. A video has one row per frame, (1, h, w); in Preview one row (t, h, w).
        merge_size: patches merged into one token along each side.
        preview: lays out as Preview does; None as 1.5 and 2.0 do.

    Returns:
        position_ids [3, L] int64 (rows: time, row, column) and delta = largest position + 1 - L, to be added to the
        sequence length to get the position of the next token.

    Raises:
        KeyeError: the placeholders of a kind are not as many as its grids make, or text interrupts a grid row.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if preview is None:
        return _place(len(ids), _locate_blocks(ids, grids, merge_size))
    for token, count in _count_announced(ids, grids, preview.vision_start).items():
        if count != (rows := len(_as_grid(grids[token]))):
            raise KeyeError(
                f"the prompt announces {count} media of placeholder {token} but has {rows} grid rows; "
                "give each medium one vision start and each video one row for all its frames"
            )
    return _place(len(ids), _locate_preview_blocks(ids, grids, merge_size, preview))


def _place(length: int, blocks: _Blocks) -> tuple[IntArray, int]:
    """Positions [3, length] and delta of a sequence with these blocks, text everywhere else."""
    starts, shapes, block_times = blocks
    sizes = shapes.prod(axis=1)
    # The counter grows by 1 at each text token and, at the first token of a row, by the row's longest extent.
    step = np.ones(length, dtype=np.int64)
    inside = np.repeat(starts, sizes) + _local_index(sizes)
    step[inside] = 0
    extents = np.array([times[-1] + 1 for times in block_times], dtype=np.int64)
    step[starts] = np.maximum(shapes[:, 1:].max(axis=1, initial=0), extents)
    base = np.cumsum(step) - step
    positions = np.broadcast_to(base, (3, length)).copy()
    _, h, w = np.repeat(shapes, sizes, axis=0).T
    local = _local_index(sizes)
    times = np.concatenate([np.empty(0, dtype=np.int64), *block_times])
    time = np.repeat(times, np.repeat(shapes[:, 1] * shapes[:, 2], shapes[:, 0]))
    positions[:, inside] = np.repeat(base[starts], sizes) + np.stack([time, local // w % h, local % w])
    return positions, int(step.sum()) - length


def _locate_blocks(ids: IntArray, grids: Grids, merge_size: int) -> _Blocks:
    """The rows of each kind on that kind's placeholders, in order."""
    all_starts = [np.empty(0, dtype=np.int64)]
    all_shapes = [np.empty((0, 3), dtype=np.int64)]
    for token, grid in grids.items():
        shapes = _merge_shapes(_as_grid(grid), merge_size)
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
    return starts[order], shapes[order], [np.arange(t) for t in shapes[order][:, 0]]


def _count_announced(ids: IntArray, kinds: Grids, vision_start: int) -> dict[int, int]:
    """How many media of each kind follow a vision start."""
    marks = np.flatnonzero(ids == vision_start)
    if len(marks) and marks[-1] == len(ids) - 1:
        raise KeyeError(f"the prompt ends with vision start {vision_start}; a medium's placeholders must follow it")
    following = ids[marks + 1]
    return {token: int((following == token).sum()) for token in kinds}


def _locate_preview_blocks(ids: IntArray, grids: Grids, merge_size: int, preview: PreviewLayout) -> _Blocks:
    """Each announced medium on the next placeholders of its kind."""
    shapes = {token: _merge_shapes(_as_grid(grid), merge_size) for token, grid in grids.items()}
    left = _count_announced(ids, grids, preview.vision_start)
    places = {token: np.flatnonzero(ids == token) for token in grids}
    row = dict.fromkeys(grids, 0)
    starts, chosen, times, end = [], [], [], 0
    while any(left.values()):
        candidates = []  # the first placeholder of each kind at `end` or after
        for token, positions in ((t, places[t]) for t, n in left.items() if n):
            i = int(np.searchsorted(positions, end))
            if i == len(positions):
                raise KeyeError(
                    f"the grid rows of placeholder {token} make more visual tokens than it has placeholders"
                )
            candidates.append((int(positions[i]), token))
        start, token = min(candidates)
        shape = shapes[token][row[token]]
        end = start + int(shape.prod())
        if end > len(ids) or (ids[start:end] != token).any():
            raise KeyeError(f"a grid row makes {end - start} visual tokens but fewer placeholders {token} follow")
        starts.append(start)
        chosen.append(shape)
        times.append(_find_row_times(token, row[token], int(shape[0]), preview))
        row[token] += 1
        left[token] -= 1
    return np.array(starts, dtype=np.int64), np.array(chosen, dtype=np.int64).reshape(-1, 3), times


def _find_row_times(token: int, row: int, frames: int, preview: PreviewLayout) -> IntArray:
    """Offsets of a row's frames on the time axis."""
    if token not in preview.seconds_per_frame:
        return np.zeros(frames, dtype=np.int64)
    rows = preview.seconds_per_frame[token]
    if not isinstance(rows, list | tuple):
        rows = np.asarray(rows, dtype=np.float64).reshape(-1)
    seconds = np.asarray(rows[row] if row < len(rows) else 1.0, dtype=np.float64)
    if seconds.ndim == 0:
        return frame_times(frames, float(seconds), preview.tokens_per_second)
    if len(seconds) != frames or (np.diff(seconds, prepend=0.0) < 0).any():
        raise KeyeError(
            f"a video of {frames} frames has the times {seconds.tolist()}; give one for each frame, ascending from 0"
        )
    return (seconds.astype(np.float32) * np.float32(preview.tokens_per_second)).astype(np.int64)


def _as_grid(grid: ArrayLike) -> IntArray:
    array = np.asarray(grid, dtype=np.int64).reshape(-1, 3)
    if (array < 1).any():
        raise KeyeError("a grid row holds a number below 1; rows are (t, h, w) in patches")
    return array


def _merge_shapes(grid: IntArray, merge_size: int) -> IntArray:
    if (grid[:, 1:] % merge_size).any():
        raise KeyeError(f"a grid row has a side that is not a multiple of merge_size={merge_size}")
    return grid // np.array([1, merge_size, merge_size])


def _local_index(sizes: IntArray) -> IntArray:
    """0..size-1 for each size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)
