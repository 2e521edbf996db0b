"""Every way in which people write data down becomes the same kind of sample, without being registered."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.chat.messages import Medium
from keye.chat.replies import parse_regions
from keye.chat.times import parse_intervals
from keye.config import GenerationConfig
from keye.data.samples import Sample
from keye.data.sources import DataSet, SampleStream, open_samples
from keye.errors import KeyeError
from keye.media.source.fetch import Source


def png(width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    for name in ("v.mp4", "w.mkv"):
        (tmp_path / name).write_bytes(b"video")
    return tmp_path


def stream(path: Path | str, **options: Any) -> SampleStream:
    return open_samples([DataSet.parse(str(path), **options)], seed=0, epochs=1)


def read(path: Path | str, **options: Any) -> list[Sample]:
    """The samples in the order of their lines, none of which may be skipped."""
    samples = stream(path, **options)
    result = sorted(samples, key=lambda sample: sample.place.line)
    assert not samples.skipped
    return result


def described(sample: Sample) -> list[tuple[str, ...]]:
    """Roles and parts: texts as they are, media by kind and name."""

    def name(part: Any) -> str:
        if isinstance(part, str):
            return part
        source = part.source if not isinstance(part.source, Source) else part.source.name
        return f"<{part.kind} {Path(str(source)).name}>"

    return [(message.role, *map(name, message.parts)) for message in sample.messages]


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1))
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LLAVA = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
}
EXPECTED = [("user", "<image a.png>", "What?"), ("assistant", "Red.")]


@pytest.mark.parametrize(
    "row",
    [
        LLAVA,
        {**LLAVA, "image": ["a.png"]},
        {**LLAVA, "conversations": [{"from": "user", "value": "<image>What?"}, {"from": "assistant", "value": "Red."}]},
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}],
         "images": ["a.png"]},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, "What?"]},
            {"role": "assistant", "content": "Red."}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Red."}], "images": ["a.png"]},
        {"query": "<image>What?", "response": "Red.", "images": ["a.png"]},
        {"question": "What?", "answer": "Red.", "image_path": "a.png"},
        {"instruction": "What?", "input": "", "output": "Red.", "image": "a.png"},
        {"conversation": [{"human": "<image>What?", "assistant": "Red."}], "images": ["a.png"]},
        {"texts": [{"user": "What?", "assistant": "Red.", "source": "x"}], "images": ["a.png"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
def test_a_question_about_an_image_is_the_same_in_every_format(row: dict[str, Any], kind: str, folder: Path) -> None:
    path = folder / f"data.{kind}"
    if kind == "json":
        write(path, [row])
    elif kind == "jsonl":
        lines(path, row)
    else:
        path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    (sample,) = read(path)
    assert described(sample) == EXPECTED
    assert sample.learn == (False, True)
    assert not sample.plain


@pytest.mark.parametrize(
    ("text", "images", "parts"),
    [
        ("Left <image> or right <image>?", 2, ("Left ", "<image a.png>", " or right ", "<image b.png>", "?")),
        ("<image>\n<image>\nWhich?", 2, ("<image a.png>", "<image b.png>", "Which?")),
        ("Which?\n<image>", 1, ("Which?", "<image a.png>")),
        ("Which?", 2, ("<image a.png>", "<image b.png>", "Which?")),
    ],
)
def test_media_stand_where_the_tags_are(text: str, images: int, parts: tuple[str, ...], folder: Path) -> None:
    row = {"query": text, "response": "x", "images": ["a.png", "b.png"][:images]}
    samples = stream(lines(folder / "a.jsonl", row))
    (sample,) = samples
    assert described(sample)[0] == ("user", *parts)
    assert any("come first" in note for note in samples.notes) == ("<image>" not in text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "<image><image>x", "images": ["a.png"]}, "the texts mark 2 images and the row has 1"),
        ({"query": "<image>x", "images": ["a.png", "b.png"]}, "the texts mark 1 image and the row has 2"),
        ({"query": "<image>x"}, "the texts mark 1 image and the row has none"),
        ({"query": "<audio>x"}, "an <audio> tag"),
        ({"query": "x", "image": "a.png", "images": ["a.png"]}, "both image and images"),
    ],
)
def test_tags_that_do_not_match_the_media_are_a_bad_row(row: dict[str, Any], reason: str, folder: Path) -> None:
    samples = stream(lines(folder / "a.jsonl", {**row, "response": "x"}, {"query": "x", "response": "y"}))
    assert len(list(samples)) == 1
    assert reason in samples.skipped[0].reason


def test_tags_in_replies_are_plain_text_unless_they_are_needed(folder: Path) -> None:
    html = {"query": "<image>How is it embedded?", "response": "By the <image> or <video> element.", "image": "a.png"}
    (sample,) = read(lines(folder / "a.jsonl", html))
    assert described(sample)[1] == ("assistant", "By the <image> or <video> element.")


def test_image_tags_stand_for_a_video_where_there_are_videos_alone(folder: Path) -> None:
    (sample,) = read(lines(folder / "a.jsonl", {**LLAVA, "image": None, "video": "v.mp4"}))
    assert described(sample)[0] == ("user", "<video v.mp4>", "What?")


def test_options_of_videos_stand_beside_them_or_inside(folder: Path) -> None:
    common = {"query": "<video><video>x", "response": "y"}
    rows = [
        {**common, "videos": ["v.mp4", "w.mkv"], "fps": [1, 2], "max_pixels": 99, "video_start": 1.5},
        {**common, "videos": [{"video": "v.mp4", "nframes": 8}, {"path": "w.mkv", "total_pixels": 5000}]},
        {**common, "videos": [["a.png", "b.png"], "v.mp4"], "timestamps": [[0.5, 1.25], None]},
    ]
    media = [sample.media for sample in read(lines(folder / "a.jsonl", *rows))]
    assert [dict(medium.options) for medium in media[0]] == [
        {"fps": 1, "max_pixels": 99, "video_start": 1.5}, {"fps": 2, "max_pixels": 99, "video_start": 1.5}
    ]  # fmt: skip
    assert [dict(medium.options) for medium in media[1]] == [{"nframes": 8}, {"total_pixels": 5000}]
    frames = media[2][0]
    assert frames == Medium("video", [str(folder / "a.png"), str(folder / "b.png")], {"timestamps": (0.5, 1.25)})
    assert media[2][1].options == {}


def test_calls_of_tools_and_their_results(folder: Path) -> None:
    call = {"name": "zoom", "arguments": {"x": 1}}
    shared = [("user", "Look."), ("assistant", "Let me see."), ("tool", "<image a.png>", "ok"), ("assistant", "Red.")]
    rows = [
        {"messages": [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "<image>ok"}, {"role": "assistant", "content": "Red."}],
         "images": ["a.png"], "tools": [{"name": "zoom", "parameters": {}}]},
        {"conversations": [
            {"from": "human", "value": "Look."}, {"from": "gpt", "value": "Let me see."},
            {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "<image>ok"},
            {"from": "gpt", "value": "Red."}],
         "images": ["a.png"], "tools": json.dumps([{"name": "zoom", "parameters": {}}])},
    ]  # fmt: skip
    first, second = read(lines(folder / "a.jsonl", *rows))
    assert described(first) == described(second) == shared
    assert first.messages[1].tool_calls == second.messages[1].tool_calls
    assert first.tools == second.tools
    assert first.learn == (False, True, False, True)


def test_messages_that_are_not_learnt(folder: Path) -> None:
    row = {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}  # fmt: skip
    (sample,) = read(lines(folder / "a.jsonl", row))
    assert sample.learn == (False, False, False, True)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
         "rejected_response": "bad"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
         "rejected_messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}]},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "good"}],
         "rejected": [{"role": "assistant", "content": "bad"}]},
        {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}]},
        {"conversations": [{"from": "human", "value": "p"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"instruction": "p", "chosen": "good", "rejected": "bad"},
    ],
)  # fmt: skip
def test_preferences_keep_the_reply_that_lost(row: dict[str, Any], folder: Path) -> None:
    (sample,) = read(lines(folder / "a.jsonl", row))
    assert described(sample) == [("user", "p"), ("assistant", "good")]
    assert [message.parts for message in sample.rejected] == [("bad",)]


def test_boxes_become_thousandths_of_the_picture(folder: Path) -> None:
    objects = {"ref": ["dog", "cat"], "bbox": [[16, 12, 32, 24], [32, 36]], "bbox_type": "real"}
    row = {
        "query": "<image>Find <ref-object>.", "response": "<bbox> and <ref-object><bbox>", "image": "a.png",
        "objects": objects,
    }  # fmt: skip
    norm = {**row, "objects": {**objects, "bbox": [[0.25, 0.25, 0.5, 0.5], [0.5, 0.75]], "bbox_type": "norm1"}}
    first, second = read(lines(folder / "a.jsonl", row, norm))
    assert first.messages == second.messages
    reply = first.messages[1].parts[0]
    assert isinstance(reply, str)
    box, point = parse_regions(reply)
    assert (box.kind, box.points) == ("box", ((250, 250), (500, 500)))
    assert (point.kind, point.points, point.label) == ("point", ((500, 750),), "cat")


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ({"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "have 1 <bbox> and objects.bbox 2"),
        ({"bbox": [[50, 2, 3, 4]]}, "not right of and below"),
        ({"bbox": [[1, 2, 300, 4]]}, "outside its picture of 64 x 48"),
        ({"bbox": [[1, 2, 3]]}, "give [x, y]"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "norm2"}, "bbox_type is 'norm2'"),
    ],
)
def test_wrong_boxes_are_a_bad_row(objects: dict[str, Any], reason: str, folder: Path) -> None:
    row = {"query": "<image>x", "response": "<bbox>", "image": "a.png", "objects": objects}
    samples = stream(lines(folder / "a.jsonl", row, {"query": "x", "response": "y"}))
    list(samples)
    assert reason in samples.skipped[0].reason


MOMENTS: dict[str, Any] = {
    "charades.txt": "v 1.0 2.5##he runs.\n",
    "activitynet.json": {"v": {"duration": 9, "timestamps": [[1.0, 2.5], [3, 4]],
                               "sentences": ["He runs.", "He sits."]}},
    "timelens-bench.json": {"v": {"duration": 9, "spans": [[1.0, 2.5]], "queries": ["he runs"]}},
    "highlights.jsonl": {"qid": 1, "query": "He runs", "duration": 9, "vid": "v",
                         "relevant_windows": [[1, 2], [2, 2.5]], "relevant_clip_ids": [1], "saliency_scores": [[1, 2]]},
    "timelens.jsonl": {"video_path": "v.mp4", "events": [{"query": "he runs", "span": [1, 2.5]}], "source": "x"},
    "when.json": {"questions": [{"qid": 1, "video_id": "v", "question": "he runs?", "correct_interval": [1, 2.5],
                                 "source_corpus": "MLVU", "video_duration_s": 9}]},
    "moments.csv": [["video", "start", "end", "text"], ["v.mp4", "0:01", "2.5", "he runs"]],
}  # fmt: skip


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_become_the_question_of_keye_ground_and_its_answer(name: str, folder: Path) -> None:
    path, value = folder / name, MOMENTS[name]
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(value)
    elif isinstance(value, str):
        path.write_text(value)
    else:
        lines(path, value) if name.endswith("l") else write(path, value)
    samples = read(path)
    sample = samples[0]
    assert len(samples) == (2 if name == "activitynet.json" else 1)
    question = GenerationConfig().ground_prompt.format(event="he runs")
    assert [part.lower() for part in described(sample)[0]] == ["user", "<video v.mp4>", question.lower()]
    answer = sample.messages[1].parts[0]
    assert isinstance(answer, str)
    assert parse_intervals(answer) == [(1.0, 2.5)]
    assert sample.task == "ground"


def test_an_event_without_times_never_happens(folder: Path) -> None:
    (folder / "a.csv").write_text("video,start,end,text\nw.mkv,,,a dog\n")
    (sample,) = read(folder / "a.csv")
    assert sample.messages[1].parts == ("[]",)


def test_a_line_for_each_time_of_an_event_is_one_answer(folder: Path) -> None:
    (folder / "a.csv").write_text("video,start,end,text\nv.mp4,8,9,A dog\nw.mkv,1,2,a dog\nv.mp4,0:01,2.5,a  dog\n")
    samples = read(folder / "a.csv")
    assert [(sample.place.line, sample.messages[1].parts[0]) for sample in samples] == [
        (2, "[[1.0, 2.5], [8.0, 9.0]]"), (3, "[[1.0, 2.0]]")
    ]  # fmt: skip
    (folder / "b.csv").write_text("video,start,end,text\nv.mp4,8,9,a\nv.mp4,,,a\nv.mp4,1,2,b\n")
    samples_of_b = stream(folder / "b.csv")
    assert len(list(samples_of_b)) == 1
    assert "never happens, and others when" in samples_of_b.skipped[0].reason


def test_times_beyond_the_duration_that_a_row_tells(folder: Path) -> None:
    row = {"vid": "v", "query": "x", "duration": 9.5}
    rows = [{**row, "relevant_windows": [[8, 12]]}, {**row, "query": "y", "relevant_windows": [[10, 12]]}]
    samples = stream(lines(folder / "a.jsonl", *rows))
    assert [sample.messages[1].parts for sample in samples] == [("[[8.0, 9.5]]",)]
    assert "begins at 10 s, and the video has 9.5 s" in samples.skipped[0].reason


def test_models_word_the_question_themselves(folder: Path) -> None:
    (folder / "a.txt").write_text("v 1 2##a dog\n")
    (sample,) = open_samples([DataSet(folder / "a.txt")], seed=0, epochs=1, ground_question="When: {}!".format)
    assert sample.messages[0].parts[1] == "When: a dog!"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "Once."}, ("Once.",)),
        ({"messages": [{"role": "assistant", "content": "Once."}]}, ("Once.",)),
        ({"image": "a.png", "caption": "A dog."}, ("<image a.png>", "A dog.")),
        ({"file_name": "v.mp4", "text": "A dog."}, ("<video v.mp4>", "A dog.")),
        ({"text": "One <image> two", "images": ["a.png"]}, ("One ", "<image a.png>", " two")),
        ({"texts": ["One", None, "two"], "images": [None, "a.png", None]}, ("One", "<image a.png>", "two")),
    ],
)
def test_texts_and_captions_are_learnt_as_they_are(row: dict[str, Any], parts: tuple[str, ...], folder: Path) -> None:
    (sample,) = read(lines(folder / "a.jsonl", row))
    assert sample.plain
    assert described(sample) == [("assistant", *parts)]
    assert sample.learn == (True,)


def test_a_text_file_has_a_text_on_each_line(folder: Path) -> None:
    (folder / "a.txt").write_text("One.\r\n\n  Two.\n")
    assert [sample.messages[0].parts for sample in read(folder / "a.txt")] == [("One.",), ("  Two.",)]


def test_a_registry_names_columns_and_tags(folder: Path) -> None:
    lines(folder / "talks.jsonl", {"dialogue": [{"who": "A", "says": "<image>What?"}, {"who": "B", "says": "Red."}],
                                   "pics": ["a.png"]})  # fmt: skip
    write(folder / "pairs.json", [{"ask": "p", "good": "good", "bad": "bad"}])
    registry = {
        "talks": {"file_name": "talks.jsonl", "formatting": "sharegpt",
                  "columns": {"messages": "dialogue", "images": "pics"},
                  "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "A", "assistant_tag": "B"}},
        "pairs": {"file_name": "pairs.json", "ranking": True,
                  "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
        "far": {"hf_hub_url": "x/y"},
    }  # fmt: skip
    path = write(folder / "dataset_info.json", registry)
    assert described(read(f"{path}:talks")[0]) == EXPECTED
    (pair,) = read(f"{folder}:pairs#1")
    assert described(pair) == [("user", "p"), ("assistant", "good")]
    assert pair.rejected[0].parts == ("bad",)
    for text, reason in ((f"{path}:talk", "did you mean talks"), (f"{path}:far", "has no file_name"),
                         (str(path), "has 3 sets; name one")):  # fmt: skip
        with pytest.raises(KeyeError, match=reason):
            stream(text)


def test_columns_take_our_names(folder: Path) -> None:
    path = lines(folder / "a.jsonl", {"ask": "What?", "say": "Red.", "pic": "a.png", "junk": {"bytes": "x"}})
    columns = {"ask": "query", "say": "response", "pic": "image", "junk": "ignore"}
    assert described(read(path, columns=columns)[0]) == EXPECTED
    turned = {"query": "ask", "response": "say", "image": "pic", "junk": "ignore"}
    assert described(read(path, columns=turned)[0]) == EXPECTED
    for wrong, reason in (
        ({"ask": "qury"}, "did you mean query"),
        ({"asks": "query"}, "no row of .* has the column asks"),
    ):
        with pytest.raises(KeyeError, match=reason):
            stream(path, columns=wrong)


def test_rows_of_no_format_are_an_error_that_lists_their_fields(folder: Path) -> None:
    with pytest.raises(KeyeError, match="no known format has the fields a, b; name those"):
        stream(lines(folder / "a.jsonl", {"a": 1, "b": 2}))
