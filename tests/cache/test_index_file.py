"""An index of a video answers as the video does, suits only its model, and is refused when anything in it is wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.index_file import ALIGN, check_full, read_index_file
from keye.chat.messages import Medium, Message
from keye.data.frameforge import make_clip, questions, render, write_mp4
from keye.models.keye import KeyeModel
from keye.ops.kv_blocks import KV_BLOCK
from keye.sessions.video_index import describe

PRELUDE = struct.Struct("<16sIQQ32s")
PICTURE = Image.new("RGB", (56, 56), "red")
CLIP = make_clip(3, frames=8, objects=2, start=0.0, step=0.5)
REQUEST = [question.text for question in questions(CLIP, random.Random(0), 4)]


@pytest.fixture(scope="module")
def nano() -> Keye:
    """A model whose answers depend on what it sees."""
    return keye.load("nano")


@pytest.fixture(scope="module")
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(CLIP, path, (112, 112))
    return path


@pytest.fixture(scope="module")
def index(model: Keye, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "short.keye"
    model.index(video, path)
    return path


@pytest.fixture(scope="module")
def answering(nano: Keye, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the same video for `nano`."""
    path = tmp_path_factory.mktemp("index") / "short.keye"
    nano.index(video, path)
    return path


@pytest.fixture
def own(index: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copyfile(index, tmp_path / "own.keye"))


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    _, _, place, length, _ = PRELUDE.unpack(data[: PRELUDE.size])
    return json.loads(data[place : place + length])


def with_header(path: Path, header: object, *, version: int = 2) -> None:
    """Puts another header in, with the right checksum: what a hostile writer can do."""
    data = path.read_bytes()
    magic, _, place, _, _ = PRELUDE.unpack(data[: PRELUDE.size])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prelude = PRELUDE.pack(magic, version, place, len(text), hashlib.sha256(text).digest())
    path.write_bytes(prelude + data[PRELUDE.size : place] + text)


def changed(path: Path, place: int) -> None:
    """Flips a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def without_cached(answer: keye.Answer) -> Any:
    """Usage but for what was computed before."""
    return replace(answer.usage, cached_tokens=0)


# Answers


def test_answers_are_those_of_the_video(nano: Keye, video: Path, answering: Path) -> None:
    before, events = answering.read_bytes(), []
    for question in REQUEST:
        ours, theirs = (nano.ask(medium, question) for medium in (answering, video))
        assert (ours.text, without_cached(ours), ours.plan) == (theirs.text, without_cached(theirs), theirs.plan)
        events.append(ours.text)
    assert len(set(events)) >= 3, "the answers differ from one another"
    assert ours.usage.media_tokens == 128
    assert nano.ground(answering, "the circle").intervals == nano.ground(video, "the circle").intervals
    nano.clear_caches()
    assert answering.read_bytes() == before and nano.runtime.ledger.used() == 0


def test_other_processes_ask_it(nano: Keye, video: Path, answering: Path) -> None:
    code = "import keye, sys; print(keye.load('nano').ask(sys.argv[1], sys.argv[2]).text)"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(answering), question], stdout=subprocess.PIPE, text=True)
        for question in REQUEST[:2]
    ]
    events = [process.communicate()[0].strip() for process in running]
    assert events == [nano.ask(video, question).text for question in REQUEST[:2]]


def test_a_conversation_and_other_media_go_on_from_it(nano: Keye, video: Path, answering: Path) -> None:
    for parts in ((REQUEST[0],), (Medium("image", PICTURE), REQUEST[0])):
        events = []
        for path in (answering, video):
            first = Message("user", (Medium("video", str(path)), *parts))
            later = [Message("assistant", ("a circle",)), Message("user", (Medium("image", PICTURE), REQUEST[1]))]
            events.append(nano.chat([first, *later]))
        assert (events[0].text, without_cached(events[0]), events[0].plan) == (
            events[1].text,
            without_cached(events[1]),
            events[1].plan,
        )


def test_positions_go_on_after_it(model: Keye, video: Path, index: Path) -> None:
    total, continued = (
        model.runtime.prompts.build([Message("user", (Medium("video", str(path)), Medium("image", PICTURE), "what?"))])
        for path in (video, index)
    )
    assert total.token_ids.tolist() == continued.token_ids.tolist()
    assert total.position_ids.tolist() == continued.position_ids.tolist()
    assert total.next_position == continued.next_position
    assert [item.kind for item in continued.media] == ["image"], "the video is not encoded again"


def test_evidence_tells_the_frames_of_the_index(model: Keye, video: Path, index: Path) -> None:
    """An indexed video comes first, media beside it after; the picture goes without thumbnails."""
    events = []
    for path in (index, video):
        answer = model.ask([path, PICTURE], "what?", max_tokens=3, ignore_eos=True, evidence=True)
        assert answer.evidence is not None and answer.evidence.steps == 3
        events.append(answer.evidence.media)
    ours, theirs = events
    assert [medium.kind for medium in ours] == ["video", "image"]
    assert ours[0].name.endswith("short.keye") and ours[0].times == theirs[0].times == CLIP.timestamps
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shares == pytest.approx(other.shares) and mine.share == pytest.approx(other.share)
    assert sum(ours[0].shares) == pytest.approx(1.0)
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


def test_an_index_has_no_probabilities_of_its_prompt(model: Keye, index: Path) -> None:
    with pytest.raises(KeyeError, match="begins with an index, .* leave out prompt_logprobs"):
        model.ask(index, "what?", max_tokens=1, prompt_logprobs=True)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_an_index_in_fewer_bits(nano: Keye, video: Path, answering: Path, tmp_path: Path, kv: Any) -> None:
    small = keye.load("nano", kv=kv)
    info = small.index(video, tmp_path / "small.keye")
    assert info.kv == kv and info.bytes < 0.8 * answering.stat().st_size
    for question in REQUEST[:2]:
        events = [item.ask(tmp_path / "small.keye", question).text for item in (small, nano)]
        assert events[0] == events[1] == small.ask(video, question).text


def test_frames_in_memory_can_be_indexed(nano: Keye, tmp_path: Path) -> None:
    frames = Frames(render(CLIP), CLIP.timestamps)
    nano.index(frames, tmp_path / "frames.keye")
    ours, theirs = (nano.ask(item, REQUEST[0]) for item in (tmp_path / "frames.keye", frames))
    assert (ours.text, ours.plan) == (theirs.text, theirs.plan)


def test_the_same_video_gives_the_same_file(model: Keye, video: Path, index: Path, tmp_path: Path) -> None:
    model.index(video, tmp_path / "again.keye")
    assert (tmp_path / "again.keye").read_bytes() == index.read_bytes()


def test_what_a_file_holds(index: Path, video: Path, model: Keye) -> None:
    usage = describe(index)
    assert usage["video"]["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert (usage["visual_tokens"], usage["model"]["name"]) == (128, model.name)
    file = check_full(index)
    assert all(section.offset % ALIGN == 0 for section in file.sections.values())
    last = file.sections["k"].offset + file.sections["k"].nbytes - file.layout.rows["k"].row_bytes
    assert file.length % KV_BLOCK != 0, "the last row of the last KV block was never written"
    assert index.read_bytes()[last : last + file.layout.rows["k"].row_bytes].strip(b"\0") == b""


def test_an_index_stays_readable_while_it_is_replaced(nano: Keye, video: Path, tmp_path: Path) -> None:
    path = tmp_path / "replaced.keye"
    nano.index(video, path)
    stream = nano.stream_ask(path, REQUEST[0])
    first = next(stream)
    nano.index(video, path, media_options={"nframes": 2})
    assert stream.finish().text.startswith(first)
    assert stream.finish().text == nano.ask(video, REQUEST[0]).text


# Refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"dtype": "bfloat16"},
            "was computed in float32, but the model is loaded in bfloat16: load it with dtype float32",
        ),
        ({"attention": "dense"}, "was indexed with sparse attention, but the question asks for dense"),
    ],
)
def test_a_model_loaded_otherwise(folder: Path, index: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        keye.load(folder, **{"dtype": "float32", **change}).ask(index, "what?")


def test_another_model(folder: Path, index: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 500000}))
    with pytest.raises(KeyeError, match="short.keye is an index of the model tiny, not of other as it is configured"):
        keye.load(other, dtype="float32").ask(index, "what?")


def test_other_weights(folder: Path, index: Path) -> None:
    trained = keye.load(folder, dtype="float32")
    trained.model.model.norm.weight.data[3] += 1
    with pytest.raises(KeyeError, match="is an index of the model tiny with other weights"):
        trained.ask(index, "what?")


def test_media_prepared_otherwise(folder: Path, index: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    with pytest.raises(KeyeError, match="prepared media otherwise: index the video again"):
        keye.load(other, dtype="float32").ask(index, "what?")


def test_what_comes_before_or_beside_it(model: Keye, video: Path, index: Path) -> None:
    for media in ([video, index], [index, index]):
        with pytest.raises(KeyeError, match="can only be the first medium"):
            model.ask(media, "what?")
    with pytest.raises(KeyeError, match="short.keye is an index, whose frames were chosen .* leave fps out"):
        model.ask(index, "what?", media_options={"fps": 1})
    with pytest.raises(KeyeError, match="indexed with another text before the video"):
        model.chat([Message("system", ("Be brief.",)), Message("user", (Medium("video", index), "what?"))])
    with pytest.raises(KeyeError, match="give its path"):
        model.ask(index.read_bytes(), "what?")
    with pytest.raises(KeyeError, match="is an index already"):
        model.index(index, index.with_name("twice.keye"))
    with pytest.raises(KeyeError, match="an image was given to index"):
        model.index(PICTURE, index.with_name("image.keye"))


def test_no_room_is_reported_before_any_work(
    model: Keye, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("something was computed")

    model.clear_caches()
    monkeypatch.setattr(KeyeModel, "encode_vision", fail)
    with pytest.raises(KeyeError, match="name a file in a folder that exists"):
        model.index(video, tmp_path / "none" / "x.keye")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(KeyeError, match="letter.txt exists and is not an earlier output of this kind: .* overwrite"):
        model.index(video, tmp_path / "letter.txt")
    assert (tmp_path / "letter.txt").read_text() == "dear"
    (tmp_path / "letter.txt").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    with pytest.raises(KeyeError, match="do not fit on the disk"):
        model.index(video, tmp_path / "x.keye")
    assert list(tmp_path.iterdir()) == [] and model.runtime.ledger.used() == 0


@pytest.mark.parametrize("length", [0, 16, 40, 71, 72, 5000, -1, -100_000])
def test_a_file_cut_short(model: Keye, own: Path, length: int) -> None:
    own.write_bytes(own.read_bytes()[:length])
    with pytest.raises(KeyeError, match=r"own.keye (is damaged|is empty)"):
        model.ask(own, "what?")


@pytest.mark.parametrize("part", ["prelude", "header", "tokens", "checksums", "indexer_k", "k", "v"])
def test_damage_is_found_on_opening(model: Keye, own: Path, part: str) -> None:
    file = read_index_file(own)
    place = {"prelude": 50, "header": file.size - 9}.get(part)
    changed(own, file.sections[part].offset + 5 if place is None else place)
    with pytest.raises(KeyeError, match="own.keye is damaged .*: copy it again, or index the video again"):
        model.ask(own, "what?")


def test_damage_between_the_samples_is_found_by_a_whole_check(own: Path, model: Keye, video: Path) -> None:
    model.index(video, own, media_options={"max_pixels": 12544, "fps": 2})
    file = read_index_file(own)
    for page in range(file.layout.layers * file.blocks):
        changed(own, file.sections["v"].offset + page * file.layout.rows["v"].block_bytes + 77)
        with pytest.raises(KeyeError, match="differs from its checksum"):
            check_full(own)
        changed(own, file.sections["v"].offset + page * file.layout.rows["v"].block_bytes + 77)
    assert check_full(own).length == file.length


def test_other_files_and_versions(model: Keye, own: Path, tmp_path: Path) -> None:
    with_header(own, header_of(own), version=7)
    with pytest.raises(KeyeError, match=r"own.keye has version 7 of the index format, .* reads versions up to 3:"):
        model.ask(own, "what?")
    (tmp_path / "text.keye").write_text("no index")
    with pytest.raises(KeyeError, match="text.keye is not an index of a video: make one with keye index"):
        check_full(tmp_path / "text.keye")
    with pytest.raises(KeyeError, match="none.keye cannot be read"):
        check_full(tmp_path / "none.keye")


def replaced(header: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    *path, name = where.split(".")
    inner = header
    for part in path:
        inner = inner[part]
    inner[name] = value
    return header


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("storage", None), ("storage.layers", 10**12), ("storage.layers", "2"), ("storage.layers", -1),
        ("storage.length", 10**9), ("storage.length", 1), ("storage.rows.k", None), ("storage.rows.k.kind", ["int8"]),
        ("storage.rows.k.kind", "int3"), ("storage.rows.k.heads", 10**6), ("storage.rows.k.heads", True),
        ("storage.rows.k.dim", 0),
        ("storage.rows.k.offset", -65536), ("storage.rows.k.offset", 2**62), ("storage.rows.k.offset", 65537),
        ("storage.rows.v.bytes", 10), ("storage.rows.indexer_k", None), ("storage.rows.indexer_k.scanned", False),
        ("storage.rows", {}), ("storage.rows.k.scanned", True), ("storage.tokens", None),
        ("storage.tokens.sha256", None), ("storage.checksums.offset", "0"), ("storage.checksums.bytes", 0),
        ("model", None), ("model.weights", 5), ("attention", "none"), ("next_position", -5), ("start", 10**6),
        ("start", 0), ("video", []), ("video.pieces", [10**9]), ("video.pieces", [{}]), ("video.pieces", []),
        ("video.timestamps", ["soon"]), ("video.plan", None), ("video.plan.frames", "8"), ("video.plan.duration", []),
        ("video.plan.part", ["0", 1.0]), ("video.plan.timestamps", [None]), ("video.plan.notes", "none"),
        ("video.plan.duration", float("inf")), ("video.plan.duration", float("nan")), ("next_position", 10**400),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(model: Keye, own: Path, where: str, value: object) -> None:
    with_header(own, replaced(header_of(own), where, value))
    with pytest.raises(KeyeError, match=r"own.keye (is damaged|was indexed with another text)"):
        model.ask(own, "what?")


def test_an_index_whose_times_count_otherwise_is_refused(model: Keye, own: Path) -> None:
    header = header_of(own)
    del header["video"]["plan"]["start_offset"]
    with_header(own, header)
    with pytest.raises(KeyeError, match=r"own.keye was made by an older keye, .*: index the video again$"):
        model.ask(own, "what?")


@pytest.mark.parametrize("header", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000, b'{"a": 1e999}'])
def test_a_header_that_is_none(model: Keye, own: Path, header: bytes) -> None:
    with_header(own, header)
    with pytest.raises(KeyeError, match="own.keye is damaged"):
        model.ask(own, "what?")


def test_a_header_beyond_the_limit_is_not_read(model: Keye, own: Path) -> None:
    magic, version, place, _, digest = PRELUDE.unpack(own.read_bytes()[: PRELUDE.size])
    with own.open("r+b") as file:
        file.write(PRELUDE.pack(magic, version, place, 1 << 40, digest))
    with pytest.raises(KeyeError, match="its header is not where one can be"):
        model.ask(own, "what?")


def test_names_that_are_no_text(model: Keye, video: Path, tmp_path: Path) -> None:
    odd = tmp_path / "b\udcffd.mp4"
    shutil.copy(video, odd)
    info = model.index(odd, tmp_path / "x\udcff.keye")
    assert info.plan["name"].startswith("b") and describe(info.path)["video"]["plan"]["name"] == "b?d.mp4"
    assert model.ask(info.path, "what?", max_tokens=1).plan[0]["name"] == "b?d.mp4"


def test_an_index_that_waits_can_be_ended(model: Keye, video: Path, tmp_path: Path) -> None:
    """A client may leave while nothing can be computed for it."""
    waits = iter(range(4))

    def check() -> None:
        if next(waits, None) is None:
            raise InterruptedError

    with model.engine.exclusive(), pytest.raises(InterruptedError):
        model.index(video, tmp_path / "left.keye", check=check)
    assert not model.core.tasks and list(tmp_path.iterdir()) == []
