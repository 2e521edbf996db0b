"""Samples in packs: what they share stands once, and every label is learnt once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.chat.messages import Medium, Message
from keye.train.layout import LaidOut, LengthError
from keye.train.packing import Packed, load, pack
from keye.train.tree import IGNORE, Path, Tree
from tests.support.layouts import moving_frames, nano_layout, sample


def lines(packed: Packed) -> list[list[int]]:
    """The token ids that each segment's last token sees, its own among them."""
    seen: list[list[int]] = []
    for start, stop, parent in packed.segments.tolist():
        seen.append((seen[parent] if parent >= 0 else []) + packed.token_ids[start:stop].tolist())
    return seen


def about(video: Medium, question: str, reply: str, line: int = 1, **fields: object) -> LaidOut:
    return nano_layout().lay_out(sample((video, question), reply, line=line, **fields))


def test_questions_about_a_video_share_it_and_replies_share_their_question() -> None:
    video, other = (Medium("video", moving_frames(seed, 3 + seed, 56)) for seed in (0, 2))
    samples = [
        about(video, "what is red?", "circle"), about(other, "what is red?", "square"),
        about(video, "what is red?", "cross"), about(video, "what is blue?", "circle"),
    ]  # fmt: skip
    alone = [path for item in samples for path in item.paths]
    (full,) = pack(samples, 10_000)
    packed = load(full)
    assert full.length == len(packed.token_ids) < sum(path.stop for path in alone)
    assert [medium.tokens for medium in packed.media] == [12, 20]  # each video once
    assert int(packed.is_visual.sum()) == 32 and len(packed.grids) == 8
    expected = sorted(path.token_ids[: path.stop].tolist() for path in alone)
    leaves = set(range(len(packed.segments))) - set(packed.segments[:, 2].tolist())
    assert sorted(lines(packed)[leaf] for leaf in leaves) == expected
    # The last token of the shared question is there once for each reply, and predicts its first token.
    starts = [packed.segments[leaf, 0] for leaf in leaves if packed.segment_sample[leaf] in (0, 2)]
    assert len({packed.token_ids[start] for start in starts}) == 1
    assert len({packed.labels[start] for start in starts}) == 2
    learnt = np.flatnonzero(packed.labels != IGNORE)
    assert len(learnt) == sum(item.learnt for item in samples) and (packed.weights[learnt] == 1.0).all()


def test_a_rejected_reply_is_a_branch_of_its_own() -> None:
    video = Medium("video", moving_frames(0, 3, 56))
    item = about(video, "what is red?", "circle", rejected=(Message("assistant", ("circles",)),), weight=2.0)
    packed = load(pack([item], 1000)[0])
    assert packed.rejected.tolist() == [False, False, True] and packed.segment_sample.tolist() == [0, 0, 0]
    for lost, path in zip((False, True), item.paths, strict=True):
        (segment,) = [s for s in packed.segments[packed.rejected == lost].tolist() if s[2] >= 0]
        labels = packed.labels[segment[0] : segment[1]]
        assert labels[labels != IGNORE].tolist() == path.labels[path.labels != IGNORE].tolist()
    assert set(packed.weights.tolist()) == {0.0, 2.0}


def test_packs_are_full_deterministic_and_hold_every_sample() -> None:
    layout = nano_layout()
    samples = [
        layout.lay_out(sample("what is red? " * (1 + i % 7), "circle", line=i)) for i in range(40)
    ]  # fmt: skip
    packs = [pack(samples, 100) for _ in range(2)]
    places = [[str(item.sample.place) for item in full.samples] for full in packs[0]]
    assert places == [[str(item.sample.place) for item in full.samples] for full in packs[1]]
    assert sorted(place for pack_places in places for place in pack_places) == sorted(
        str(item.sample.place) for item in samples
    )
    assert all(full.length <= 100 for full in packs[0])


def test_samples_that_fit_no_pack_are_refused_or_counted() -> None:
    samples = [about(Medium("video", moving_frames(0, n, 56)), "what?", "circle", line=n) for n in (2, 30)]
    with pytest.raises(LengthError, match=r"data\.jsonl:30: the sample takes \d+ tokens, 120 of them visual, but "
                       "max_length is 100"):  # fmt: skip
        pack(samples, 100)
    skipped: list[LengthError] = []
    (full,) = pack(samples, 100, skipped=skipped)
    assert len(skipped) == 1 and [item.sample.place.line for item in full.samples] == [2]


def plain_path(tokens: list[int], first: int) -> Path:
    ids = np.array(tokens, np.int64)
    labels = np.append(ids[1:], IGNORE)
    labels[:first] = IGNORE
    return Path(ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), labels, np.zeros(len(ids), bool), ())


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.integers(0, 7)), min_size=1, max_size=9)
)
def test_trees_keep_every_line_and_label(drawn: list[tuple[list[int], int]]) -> None:
    paths = [plain_path(tokens, min(first, len(tokens) - 2)) for tokens, first in drawn]
    tree = Tree()
    for number, path in enumerate(paths):
        tree.add(path, number)
    ids, labels = list[list[int]](), list[list[int]]()
    owned: dict[int, int] = {}
    for branch, parent in tree.branches():
        part = slice(branch.start, branch.stop)
        ids.append((ids[parent] if parent >= 0 else []) + branch.path.token_ids[part].tolist())
        labels.append((labels[parent] if parent >= 0 else []) + branch.path.labels[part].tolist())
        owned[branch.sample] = owned.get(branch.sample, 0) + int((branch.path.labels[part] != IGNORE).sum())
        assert branch.start < branch.stop
    assert tree.length == sum(b.stop - b.start for b, _ in tree.branches())
    for number, path in enumerate(paths):
        assert owned[number] == int((path.labels != IGNORE).sum())
        line = next(
            i
            for i, have in enumerate(ids)
            if have[: path.stop] == path.token_ids[: path.stop].tolist()
            and labels[i][path.first_label : path.stop] == path.labels[path.first_label : path.stop].tolist()
        )
        assert line >= 0
