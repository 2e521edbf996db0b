"""Lines of a manifest become questions; one that cannot becomes a sentence, and the others stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.batch.manifest import BadLine, Item, by_media, read_manifest
from keye.errors import KeyeError

QUESTION = {"video": "a.mp4", "question": "what happens?"}


def read(folder: Path, *lines: Any, **defaults: Any) -> list[Item | BadLine]:
    """A manifest of these lines, objects or texts."""
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_manifest(path, defaults)


def only(folder: Path, line: Any, **defaults: Any) -> Item:
    (result,) = read(folder, line, **defaults)
    assert isinstance(result, Item), result
    return result


def test_a_line_is_the_body_of_a_chat(tmp_path: Path) -> None:
    item = only(tmp_path, {"id": "a", **QUESTION, "system": "Be brief.", "fps": 1, "start": 3, "max_tokens": 9})
    content = [
        {"type": "video", "video": str(tmp_path / "a.mp4"), "video_start": 3, "fps": 1},
        {"type": "text", "text": "what happens?"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert item.body == {"messages": messages, "max_tokens": 9}
    assert (item.id, item.line, item.media) == ("a", 1, (str(tmp_path / "a.mp4"),))


def test_schema_thinking_and_evidence(tmp_path: Path) -> None:
    body = only(tmp_path, {**QUESTION, "schema": {"type": "object"}, "think": False, "evidence": True}).body
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["keye"] == {"evidence": True}


def test_settings_of_replies(tmp_path: Path) -> None:
    settings = {"logit_bias": {"5": -100}, "frequency_penalty": 0.5, "min_tokens": 2, "stop_token_ids": [7]}
    body = only(tmp_path, {**QUESTION, **settings}, temperature=0.5).body
    assert {name: body[name] for name in (*settings, "temperature")} == {**settings, "temperature": 0.5}


def test_media_are_distinguished_by_their_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.bin", "PNG")
    (tmp_path / "clip").write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom")
    item = only(tmp_path, {"media": ["picture.bin", "clip"], "question": "what?", "fps": 2})
    image, video, _ = item.body["messages"][0]["content"]
    assert (image["type"], "fps" in image) == ("image", False)
    assert (video["type"], video["fps"]) == ("video", 2)


def test_files_named_like_addresses(tmp_path: Path) -> None:
    for name in ("data: notes.png", "http: a.png", "~me.png", "file-1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        for key in ("media", "image"):
            item = only(tmp_path, {key: name, "question": "what?"})
            assert item.media == (str(tmp_path / name),)
            assert item.body["messages"][0]["content"][0]["type"] == "image"
    assert only(tmp_path, {"video": "http://media.example/a.mp4", "question": "?"}).media == (
        "http://media.example/a.mp4",
    )


def test_defaults_give_way_to_lines(tmp_path: Path) -> None:
    defaults = {"fps": 2, "max_frames": 8, "max_tokens": 5, "think": True}
    item = only(tmp_path, {**QUESTION, "fps": 1, "max_tokens": 7}, **defaults)
    part = item.body["messages"][0]["content"][0]
    assert (part["fps"], part["max_frames"], item.body["max_tokens"]) == (1, 8, 7)
    assert item.body["chat_template_kwargs"] == {"enable_thinking": True}
    image = only(tmp_path, {"image": "a.png", "question": "what?"}, **defaults).body["messages"][0]["content"][0]
    assert "fps" not in image


def openai(**body: Any) -> dict[str, Any]:
    part = {"type": "video_url", "video_url": {"url": "a.mp4", "fps": 1}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    return {
        "custom_id": "x", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "gpt", "messages": messages, **body},
    }  # fmt: skip


def test_lines_of_openais_batch_format(tmp_path: Path) -> None:
    item = only(tmp_path, openai(max_completion_tokens=3), max_tokens=5, max_frames=4)
    assert (item.id, item.openai, item.media) == ("x", True, (str(tmp_path / "a.mp4"),))
    reserved = item.body["messages"][0]["content"][0]["video_url"]
    assert reserved == {"url": str(tmp_path / "a.mp4"), "fps": 1, "max_frames": 4}
    assert "max_tokens" not in item.body


def test_addresses_and_uploads_stay_as_they_are(tmp_path: Path) -> None:
    names = ["https://example.org/a.mp4", "data:video/mp4;base64,AAAA", "file-1234"]
    assert only(tmp_path, {"video": names, "question": "what?"}).media == tuple(names)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{broken", "the line is not JSON"),
        ("[1]", "the line is not a JSON object"),
        ({"video": "a.mp4"}, "the question is missing or empty"),
        ({"question": "what?"}, "the media are missing; give video"),
        ({**QUESTION, "frames": 3}, "'frames' is not a key of a line; keys are adaptive_budget, "),
        ({"video": 3, "question": "what?"}, "video must be a path or an address"),
        ({"media": "nothing.mp4", "question": "what?"}, "does not exist"),
        ({"media": "https://example.org/a", "question": "what?"}, "name it video or image"),
        ({**QUESTION, "id": ["a"]}, "the id is not a text"),
        ({**QUESTION, "id": "line-9"}, "is that of a line without one"),
        ({**openai(), "url": "/v1/embeddings"}, "method and url must be POST and /v1/chat/completions"),
        (openai(stream=True), "stream cannot be used"),
        ({**openai(), "extra": 1}, "'extra' is not a key of a batch line"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_is_read(tmp_path: Path, line: Any, sentence: str) -> None:
    rejected, item = read(tmp_path, line, QUESTION)
    assert isinstance(rejected, BadLine) and sentence in rejected.reason and rejected.id == "line-1"
    assert isinstance(item, Item) and item.id == "line-2"


def test_the_second_of_two_lines_with_one_id_is_refused(tmp_path: Path) -> None:
    first, second = read(tmp_path, {**QUESTION, "id": 7}, {**QUESTION, "id": "7"})
    assert isinstance(first, Item) and first.id == "7"
    assert isinstance(second, BadLine) and second.reason.startswith("the id '7' stands on line 1 already")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text('id,video,question,fps\n1,a.mp4,"who, and when?",0.5\n2,"[""a.mp4"", ""b.mp4""]",what?,\n')
    first, second = read_manifest(path)
    assert isinstance(first, Item) and first.id == "1"
    video, text = first.body["messages"][0]["content"]
    assert (video["fps"], text["text"]) == (0.5, "who, and when?")
    assert isinstance(second, Item) and len(second.media) == 2


def test_numbers_of_csv_that_are_none_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("video,question,fps,temperature\na.mp4,who?,NaN,1e999\n")
    (item,) = read_manifest(path)
    assert isinstance(item, Item) and item.body["temperature"] == "1e999"
    assert item.body["messages"][0]["content"][0]["fps"] == "NaN"


def test_a_digest_tells_what_is_asked(tmp_path: Path) -> None:
    requested = [
        only(tmp_path, QUESTION).digest,
        only(tmp_path, {**QUESTION, "question": "why?"}).digest,
        only(tmp_path, QUESTION, fps=1).digest,
    ]
    assert len(set(requested)) == 3 and only(tmp_path, QUESTION).digest == requested[0]


def test_questions_about_one_video_stand_together(tmp_path: Path) -> None:
    items = read(tmp_path, QUESTION, {**QUESTION, "video": "b.mp4"}, QUESTION)
    groups = by_media([item for item in items if isinstance(item, Item)])
    assert [[item.line for item in group] for group in groups.values()] == [[1, 3], [2]]


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match="cannot be read"):
        read_manifest(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("# nothing\n\n")
    with pytest.raises(KeyeError, match="has no lines"):
        read_manifest(tmp_path / "empty.jsonl")


BAD_LINES = (
    '{"video": "a.mp4", "question": "x", "seed": ' + "1" * 5000 + "}",
    '{"video": "a.mp4", "question": "x", "seed": 1e999}',
    '{"video": "a.mp4", "question": "x", "temperature": NaN}',
    '{"video": "a.mp4", "question": "x", "stop": ' + "[" * 100_000,
    '{"media": "a\\u0000b.mp4", "question": "x"}',
    '{"media": "~nosuchuser/a.mp4", "question": "x"}',
    '{"media": "' + "a" * 5000 + '", "question": "x"}',
    '{"id": "a\\ud800", "video": "a.mp4", "question": "x"}',
    '{"id": {"a": 1}, "video": "a.mp4", "question": "x"}',
    '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": 7}}',
    "[1, 2]", "null", "{", "\x00",
)  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_refused_alone(tmp_path: Path, line: str) -> None:
    bad, good = read(tmp_path, line, QUESTION)
    assert isinstance(bad, BadLine) and isinstance(good, Item)
    assert "sys.set" not in bad.reason and "Traceback" not in bad.reason


@pytest.mark.parametrize(
    "source", ["a\x00b.mp4", "~nosuchuser/a.mp4", "a\ud800.mp4", "file:///a\x00b", "x" * 5000, "\udcff.mp4"]
)
def test_unknown_file_names_stay_for_the_worker(tmp_path: Path, source: str) -> None:
    odd, good = read(tmp_path, {"video": source, "question": "x"}, QUESTION)
    assert isinstance(good, Item) and isinstance(odd, Item | BadLine)


def test_a_line_that_is_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.batch.manifest.MAX_LINE", 100)
    long, good = read(tmp_path, {**QUESTION, "system": "x" * 3_000_000}, QUESTION)
    assert isinstance(long, BadLine) and "more than 100 B" in long.reason
    assert isinstance(good, Item) and good.line == 2


def test_bad_rows_of_csv_are_refused_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    rows = [b"video,question,seed", b"a.mp4,one,1", b"a.mp4,t\xffo,2", b"a.mp4," + b"x" * 200_000 + b",3",
            b"a.mp4,four," + b"1" * 5000, b"a.mp4,five,5"]  # fmt: skip
    path.write_bytes(b"\n".join(rows) + b"\n")
    result = read_manifest(path, {})
    assert [type(entry) for entry in result] == [Item, BadLine, BadLine, Item, Item]


def test_files_of_other_editors(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf# mine\r\n{"video": "a.mp4", "question": "who?"}\r\n{"video": "\xff", "question": "x"}\r\n'
    )
    good, bad = read_manifest(path, {})
    assert isinstance(good, Item) and good.line == 2
    assert isinstance(bad, BadLine) and bad.reason == "the line is not in UTF-8; save the file as UTF-8"
