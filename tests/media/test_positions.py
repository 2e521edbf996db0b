"""M-RoPE positions of prompts with images and videos."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.errors import KeyeError
from keye.media.positions import PreviewLayout, build_position_ids, frame_times, split_grid_rows
from tests.support.positions import get_rope_index

START, IMAGE, VIDEO, TEXT = 500, 502, 503, 7


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


# Preview: one grid row for a whole video, whose time axis counts seconds


def preview(*seconds: float, tokens_per_second: float = 2) -> PreviewLayout:
    return PreviewLayout(START, {VIDEO: seconds}, tokens_per_second)


def test_preview_time_counts_seconds() -> None:
    tokens = [START, *[VIDEO] * 6, TEXT]
    positions, delta = build_position_ids(tokens, {VIDEO: [[3, 2, 4]]}, preview=preview(1.0))
    assert positions.tolist() == [
        [0, 1, 1, 3, 3, 5, 5, 6],  # two steps a second, one second a frame
        [0, 1, 1, 1, 1, 1, 1, 6],
        [0, 1, 2, 1, 2, 1, 2, 6],
    ]
    assert delta == 7 - len(tokens)


def test_preview_wide_frames_outlast_their_time() -> None:
    positions, _ = build_position_ids([START, *[VIDEO] * 8, TEXT], {VIDEO: [[2, 2, 8]]}, preview=preview(0.5))
    assert positions[:, -1].tolist() == [5, 5, 5], "the row is four columns wide but only two steps long"


def test_preview_products_are_rounded_to_float32() -> None:
    """13 frames at 13 a 12 seconds: the last one lies at 24 steps in float32 and just below in float64."""
    seconds = 1 / 1.076923076923077
    got = frame_times(14, seconds, 2)
    exact = [int(frame * seconds * 2) for frame in range(14)]
    assert got.tolist() != exact
    assert np.abs(got - exact).max() == 1


@given(st.integers(1, 40), st.floats(0.01, 20), st.floats(0.5, 8))
def test_preview_time_never_goes_back(frames: int, seconds: float, rate: float) -> None:
    times = frame_times(frames, seconds, rate)
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert times[-1] <= (frames - 1) * seconds * rate * (1 + 1e-6)


def test_preview_batch_equals_its_rows() -> None:
    first = [START, *[VIDEO] * 4, TEXT, START, *[IMAGE] * 4]
    second = [TEXT, START, *[VIDEO] * 2]
    length = len(first)
    grids = {IMAGE: [[1, 4, 4]], VIDEO: [[2, 2, 4], [2, 2, 2]]}
    rows, mask = [first, [0] * (length - 4) + second], [[1] * length, [0] * (length - 4) + [1] * 4]
    positions, deltas = get_rope_index(rows, grids, attention_mask=mask, preview=preview(1.5, 4.0))
    alone, _ = build_position_ids(first, {IMAGE: grids[IMAGE], VIDEO: [[2, 2, 4]]}, preview=preview(1.5))
    assert np.array_equal(positions[:, 0], alone)
    alone, delta = build_position_ids(second, {VIDEO: [[2, 2, 2]]}, preview=preview(4.0))
    assert np.array_equal(positions[:, 1, -4:], alone)
    assert deltas[1, 0] == delta + 4 - length


def test_preview_placeholders_without_a_start_are_text() -> None:
    tokens = [START, *[IMAGE] * 4, TEXT, *[IMAGE] * 4]
    positions, _ = get_rope_index([tokens], {IMAGE: [[1, 4, 4]]}, preview=preview())
    assert positions[0, 0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("tokens", "rows", "message"),
    [
        ([TEXT, START], [], "ends with vision start 500"),
        ([START, VIDEO, TEXT, START, VIDEO], [[1, 2, 2]], "announces 2 media of placeholder 503 but has 1 grid rows"),
        ([START, VIDEO, TEXT, VIDEO], [[2, 2, 2]], "makes 2 visual tokens but fewer placeholders 503 follow"),
        ([TEXT, VIDEO], [[1, 2, 2]], "announces 0 media of placeholder 503 but has 1 grid rows"),
    ],
)
def test_preview_errors(tokens: list[int], rows: list[list[int]], message: str) -> None:
    with pytest.raises(KeyeError, match=message):
        build_position_ids(tokens, {VIDEO: rows}, preview=preview())


def test_preview_batch_without_enough_rows() -> None:
    with pytest.raises(KeyeError, match="announces 2 media of placeholder 503 but has 1 grid rows"):
        get_rope_index([[START, VIDEO, START, VIDEO]], {VIDEO: [[1, 2, 2]]}, preview=preview())


def test_preview_frames_at_uneven_times() -> None:
    tokens = [START, *[VIDEO] * 8, START, *[VIDEO] * 4]
    grids = {VIDEO: [[4, 2, 4], [2, 2, 4]]}
    layout = PreviewLayout(START, {VIDEO: [(0.0, 1.0, 2.6, 20.0), 0.5]})
    positions, _ = build_position_ids(tokens, grids, preview=layout)
    assert positions[0].tolist() == [0, 1, 1, 3, 3, 6, 6, 41, 41, 42, 43, 43, 44, 44]
    for times in ((0.0, 1.0), (0.0, 3.0, 2.0, 4.0)):
        with pytest.raises(KeyeError, match="4 frames has the times"):
            build_position_ids(tokens, grids, preview=PreviewLayout(START, {VIDEO: [times, 0.5]}))
