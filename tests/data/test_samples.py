"""Samples out of files of conversations: order, weights, resuming, and what is skipped."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from keye.chat.messages import Medium
from keye.data.files.rows import Row
from keye.data.formats.context import Context
from keye.data.formats.detect import convert
from keye.data.samples import BadRow, Place, Sample
from keye.data.sources import DataSet, open_samples
from keye.errors import KeyeError


def talk(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}],
        **fields,
    }


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def places(samples: Any) -> list[str]:
    return [f"{Path(sample.place.file).name}:{sample.place.line}" for sample in samples]


def read_all(path: Path, **options: Any) -> list[Sample]:
    """The samples of one pass in the order of their lines."""
    return sorted(open_samples([DataSet(path, **options)], seed=0, epochs=1), key=lambda sample: sample.place.line)


def test_a_conversation_with_an_image_becomes_messages_with_the_image_at_its_tag(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    row = talk(1, images=["a.png"], system="Be brief.")
    row["messages"][0]["content"] = "<image>\nWhat is it?"
    (sample,) = read_all(write_lines(tmp_path / "a.jsonl", [row]))
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1].parts == (Medium("image", str(tmp_path / "a.png")), "What is it?")
    assert sample.learn == (False, False, True)


def test_every_row_comes_once_an_epoch_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [talk(i) for i in range(50)])
    orders = [places(open_samples([DataSet(path)], seed=seed, epochs=2)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order[:50]) == sorted(order[50:]) == sorted(f"a.jsonl:{i + 1}" for i in range(50))
        assert order[:50] != order[50:]


def test_sets_are_mixed_by_weight_all_through_the_epoch(tmp_path: Path) -> None:
    sets = [
        DataSet(write_lines(tmp_path / "a.jsonl", [talk(i) for i in range(100)])),
        DataSet(write_lines(tmp_path / "b.jsonl", [talk(i) for i in range(20)]), weight=2.5),
    ]
    order = places(open_samples(sets, seed=3, epochs=1))
    assert len(order) == 150
    from_b = [name.startswith("b") for name in order]
    assert sum(from_b) == 50
    assert all(abs(sum(from_b[:n]) - n / 3) <= 3 for n in range(150))


@pytest.mark.parametrize(("part", "count"), [("#7", 7), ("25%", 10), ("#100", 100)])
def test_a_part_of_the_rows_is_the_same_every_epoch(part: str, count: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [talk(i) for i in range(40)])
    order = places(open_samples([DataSet(path, sample=part)], seed=5, epochs=2))
    assert len(order) == 2 * count
    assert set(order[:count]) == set(order[count:])
    assert len(set(order)) == min(count, 40)


def test_the_part_stands_behind_the_path() -> None:
    assert DataSet.parse("a/b.json#2000") == DataSet(Path("a/b.json"), sample="#2000")
    assert DataSet.parse("a/b.json#12.5%") == DataSet(Path("a/b.json"), sample="12.5%")
    assert DataSet.parse("a/b#c.json") == DataSet(Path("a/b#c.json"))


@pytest.mark.parametrize("stop", [0, 1, 17, 60, 130])
def test_a_stream_resumes_at_any_sample(stop: int, tmp_path: Path) -> None:
    sets = [
        DataSet(write_lines(tmp_path / "a.jsonl", [talk(i) for i in range(30)] + ["{broken"])),
        DataSet(write_lines(tmp_path / "b.jsonl", [talk(i) for i in range(10)]), weight=1.5, sample="80%"),
    ]
    expected = places(open_samples(sets, seed=9, epochs=3.2))
    stream = open_samples(sets, seed=9, epochs=3.2)
    before = [next(stream) for _ in range(stop)]
    state = json.loads(json.dumps(stream.state()))
    assert places(before) + places(open_samples(sets, seed=9, epochs=3.2, state=state)) == expected


def test_a_changed_file_cannot_be_resumed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [talk(i) for i in range(10)])
    stream = open_samples([DataSet(path)], seed=0, epochs=1)
    next(stream)
    write_lines(path, [talk(i + (i == 7)) for i in range(10)])
    with pytest.raises(KeyeError, match="a.jsonl has changed since the run began"):
        open_samples([DataSet(path)], seed=0, epochs=1, state=stream.state())


BAD = [
    ("{broken", "is not JSON"),
    ("[1, 2]", "not a JSON object but a list"),
    ({"messages": []}, "the conversation is empty"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
    ({"messages": [{"content": "x"}]}, "message 1 has no role"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last message is the user's"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "an empty reply"),
    (talk(1, images=["missing.png"]), "missing.png does not exist"),
    (talk(1, images=["."]), "is a directory"),
    (talk(1, images=["empty.png"]), "is empty"),
    (talk(1, videos=["a.png"], fps=-1), "fps is -1"),
    (talk(1, videos=["a.png"], fps=1, nframes=4), "exclude each other"),
    (talk(1, videos=["a.png"], fps=[1, 2]), "fps has 2 entries and the row 1 video"),
    (talk(1, videos=["a.png"], video_start=5, video_end=4), "video_start is 5"),
    (talk(1, videos=[["a.png", "a.png"]], timestamps=[1]), "2 pictures have 1 timestamps"),
    (talk(1, videos=["a.png"], video_fps=1), "video_fps would change what is learnt"),
    (talk(1, vidoes=["a.png"]), "did you mean video"),
    (talk(1, audios=["a.wav"]), "audios, which Keye does not hear"),
    ({"prompt_text": "x", "reply_text": "y"}, "no known format has the fields prompt_text, reply_text"),
    (talk(1, rejected_response="a1"), "the same as the chosen one"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_skipped_with_its_line_and_the_reason(row: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "empty.png").write_bytes(b"")
    path = write_lines(tmp_path / "a.jsonl", [talk(0), "", row, talk(2)])
    stream = open_samples([DataSet(path)], seed=0, epochs=1)
    assert sorted(sample.place.line for sample in stream) == [1, 4]
    (skip,) = stream.skipped
    assert skip.place.line == 3
    assert reason in str(skip)


def test_too_many_bad_rows_are_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [talk(i) if i % 50 else "{" for i in range(2000)])
    few = write_lines(tmp_path / "b.jsonl", [talk(i) if i % 20 else "{" for i in range(400)])
    with pytest.raises(KeyeError, match=r"20 of 400 rows cannot"):
        list(open_samples([DataSet(few)], seed=0, epochs=3))
    with pytest.raises(KeyeError, match=r"of 1,\d+ rows cannot be learnt from, more than 1%"):
        list(open_samples([DataSet(path)], seed=0, epochs=1))


@pytest.mark.parametrize(
    ("rows", "which"),
    [(1, "the only row cannot be learnt from: "), (3, "none of the 3 rows can be learnt from; the last is ")],
)
def test_nothing_but_bad_rows_is_an_error(rows: int, which: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["{"] * rows)
    with pytest.raises(KeyeError, match=f"{which}.*a.jsonl:"):
        list(open_samples([DataSet(path)], seed=0, epochs=None))


ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png", "min_pixels": 5}, "x"]},
        {"role": "assistant", "content": "a", "loss": True, "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "z"}],
     "tools": [{"name": "f"}], "mode": "think", "task": "t", "weight": 1.5},
    {"messages": [{"role": "user", "content": "<video>q"}, {"role": "assistant", "content": "a <bbox>"}],
     "videos": [["a.png", "a.png"]], "timestamps": [0, 1], "rejected_response": "b",
     "objects": {"ref": [], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"}},
    {"query": "q", "response": "r", "history": [["a", "b"]], "videos": ["a.png"], "video_start": 1, "video_end": 2},
    {"prompt": "p", "chosen": [{"role": "assistant", "content": "g"}], "rejected": "b"},
    {"video": "a.png", "start": 1, "end": "0:02", "text": "x"}, {"texts": ["a", None], "images": [None, "a.png"]},
]  # fmt: skip
ODD: list[Any] = [
    None, -1, 1e400, float("nan"), 10**400, True, "", [], {}, [None], [[]], [{}], {"a": 1}, ["a", 1], "<image>", "[",
    {"type": "image"}, {"role": "user"}, {"url": {"url": {}}}, ["a.png"] * 3, "http://x/y.png", "\ud83d", "1:2:3",
]  # fmt: skip


def list_places(value: Any) -> list[tuple[Any, ...]]:
    """Every place in nested data but the outermost."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((key,), *((key, *rest) for rest in list_places(inner)))]


def test_odd_values_anywhere_in_a_row_make_it_a_bad_row_at_most(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    draw, context = random.Random(0), Context(tmp_path)
    for _ in range(3000):
        row = json.loads(json.dumps(draw.choice(ROWS)))
        *outer, last = draw.choice(list_places(row))
        inner = row
        for key in outer:
            inner = inner[key]
        inner[last] = draw.choice(ODD)
        with contextlib.suppress(BadRow):
            convert(Row(row, Place("a", 1)), context)
