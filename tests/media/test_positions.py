"""M-RoPE positions of prompts with images and videos."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.errors import KeyeError
from keye.media import build_position_ids, get_rope_index, split_grid_rows

IMAGE, VIDEO, TEXT = 502, 503, 7


def slow_positions(tokens: list[int], grids: dict[int, list[list[int]]]) -> list[list[int]]:
    """The rule of the module's docstring, token by token."""
    queues = {token: list(rows) for token, rows in grids.items()}
    columns: list[tuple[int, int, int]] = []
    i = 0
    while i < len(tokens):
        base = max((max(c) for c in columns), default=-1) + 1
        if tokens[i] not in queues:
            columns.append((base, base, base))
            i += 1
            continue
        t, h, w = queues[tokens[i]].pop(0)
        block = [(base + a, base + b, base + c) for a in range(t) for b in range(h // 2) for c in range(w // 2)]
        columns += block
        i += len(block)
    return [list(axis) for axis in zip(*columns, strict=True)]


GRID = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).map(lambda s: [s[0], s[1] * 2, s[2] * 2])
PARTS = st.lists(st.one_of(st.integers(1, 5), st.tuples(st.sampled_from([IMAGE, VIDEO]), GRID)), min_size=1, max_size=8)


@given(PARTS)
def test_equals_the_slow_rule(parts: list[int | tuple[int, list[int]]]) -> None:
    tokens: list[int] = []
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for part in parts:
        if isinstance(part, int):
            tokens += [TEXT] * part
        else:
            kind, (t, h, w) = part
            tokens += [kind] * (t * h * w // 4)
            grids[kind].append([t, h, w])
    positions, delta = build_position_ids(tokens, grids)
    assert positions.dtype == np.int64
    assert positions.tolist() == slow_positions(tokens, grids)
    assert delta == positions.max() + 1 - len(tokens)


def test_text_only() -> None:
    positions, delta = build_position_ids([1, 2, 3], {IMAGE: []})
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0


def test_image_first_and_alone() -> None:
    positions, delta = build_position_ids([IMAGE] * 6, {IMAGE: [[1, 4, 6]]})
    assert positions.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert delta == -3


def test_official_left_padded_row() -> None:
    ids = [[0, 0, 9, 500, *[IMAGE] * 4, 501, 9]]
    positions, deltas = get_rope_index(ids, {IMAGE: [[1, 4, 4]]}, attention_mask=[[0, 0, *[1] * 8]])
    assert positions[:, 0].tolist() == [
        [1, 1, 0, 1, 2, 2, 2, 2, 4, 5],
        [1, 1, 0, 1, 2, 2, 3, 3, 4, 5],
        [1, 1, 0, 1, 2, 3, 2, 3, 4, 5],
    ]
    assert deltas.tolist() == [[-4]]


def test_batch_equals_its_rows() -> None:
    first = [TEXT, *[IMAGE] * 6, TEXT, *[VIDEO] * 2, TEXT, *[VIDEO] * 2]
    second = [TEXT, TEXT]
    third = [*[IMAGE] * 4, TEXT, *[VIDEO] * 2]
    grids = {IMAGE: [[1, 4, 6], [1, 4, 4]], VIDEO: [[1, 2, 4]] * 3}
    length = len(first)
    rows = [first, second + [0] * (length - 2), [0] * (length - 7) + third]
    mask = [[1] * length, [1, 1] + [0] * (length - 2), [0] * (length - 7) + [1] * 7]
    positions, deltas = get_rope_index(rows, grids, attention_mask=mask)
    expected = [
        build_position_ids(first, {IMAGE: grids[IMAGE][:1], VIDEO: grids[VIDEO][:2]})[0],
        build_position_ids(second, {})[0],
        build_position_ids(third, {IMAGE: grids[IMAGE][1:], VIDEO: grids[VIDEO][2:]})[0],
    ]
    for b, alone in enumerate(expected):
        valid = np.array(mask[b], dtype=bool)
        assert np.array_equal(positions[:, b, valid], alone)
        assert (positions[:, b, ~valid] == 1).all()
        assert deltas[b, 0] == alone.max() + 1 - length


def test_errors() -> None:
    with pytest.raises(KeyeError, match="5 placeholders 502 but its 1 grid rows make 4 visual tokens"):
        build_position_ids([IMAGE] * 5, {IMAGE: [[1, 4, 4]]})
    with pytest.raises(KeyeError, match="split_grid_rows"):
        build_position_ids([VIDEO, TEXT, VIDEO], {VIDEO: [[2, 2, 2]]})
    with pytest.raises(KeyeError, match="multiple of merge_size"):
        build_position_ids([IMAGE], {IMAGE: [[1, 3, 2]]})
    with pytest.raises(KeyeError, match="below 1"):
        build_position_ids([IMAGE], {IMAGE: [[1, 0, 2]]})
    with pytest.raises(KeyeError, match="placeholders"):
        get_rope_index([[TEXT, IMAGE]], {IMAGE: [[1, 2, 2]] * 2})


def test_split_grid_rows() -> None:
    assert split_grid_rows([[2, 4, 6], [1, 2, 2]]).tolist() == [[1, 4, 6], [1, 4, 6], [1, 2, 2]]
    positions, _ = build_position_ids([VIDEO, TEXT, VIDEO], {VIDEO: split_grid_rows([[2, 2, 2]])})
    assert positions.tolist() == [[0, 1, 2]] * 3
