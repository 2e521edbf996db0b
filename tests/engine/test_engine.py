"""`keye.load` and its results: mistakes are reported before any work, streams iterate, notes name what is unusual."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import keye
from keye import Frames, Keye, KeyeError
from keye.chat.messages import Medium
from keye.chat.replies import parse_reply
from keye.config import ProcessorConfig
from keye.data.frameforge import make_clip, write_mp4
from keye.engine.media import as_medium, plan_medium
from keye.evals.tasks.frameforge import EvalOptions, evaluate
from keye.media.processor import Processor
from keye.media.video import VideoReader

FRAMES = np.zeros((4, 56, 56, 3), dtype=np.uint8)
PICTURE = Image.new("RGB", (56, 56), "red")


@pytest.fixture(scope="module")
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model with changed fields of config.json."""

    def copy(**changes: Any) -> Path:
        result = Path(shutil.copytree(folder, tmp_path / "own"))
        config = json.loads((result / "config.json").read_text()) | changes
        (result / "config.json").write_text(json.dumps(config))
        return result

    return copy


@pytest.fixture
def _nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the processor is a failure."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a medium was processed")

    for name in ("image", "video", "frames"):
        monkeypatch.setattr(Processor, name, fail)


# Loading


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("index_kv", "load has no option index_kv; did you mean indexer_kv?"), ("zzz", "load has no option zzz")],
)
def test_unknown_options_of_load_name_the_one_that_was_meant(folder: Path, option: str, sentence: str) -> None:
    with pytest.raises(KeyeError, match=f"{re.escape(sentence)}$"):
        keye.load(folder, **{option: "int8"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attention": "foo"}, "attention is 'foo'; choose sparse or dense"),
        ({"attention": None}, "attention is None; choose sparse or dense"),
        ({"device": "meta"}, "device 'meta' cannot be used here: it holds shapes without numbers"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
    ],
)
def test_what_cannot_be_loaded(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        keye.load(folder, **options)


def test_attention_is_what_was_asked_for(folder: Path, model: Keye) -> None:
    assert (model.runtime.attention, keye.load(folder, attention="dense").runtime.attention) == ("sparse", "dense")
    assert model.ask(Frames(FRAMES), "what?", attention="dense", max_tokens=1).attention == "dense"
    with pytest.raises(KeyeError, match="attention is 'foo'"):
        model.stream_ask(Frames(FRAMES), "what?", attention="foo")


def test_a_sound_checkpoint_has_no_notes(model: Keye) -> None:
    assert model.notes == ()


def test_notes_tell_what_is_left_out_and_what_is_missing(own: Callable[..., Path]) -> None:
    result = own(zebra=1, apple={})
    weights = result / "model.safetensors"
    remaining = {name: tensor for name, tensor in load_file(weights).items() if ".sa_indexer." not in name}
    save_file({**remaining, "visual.vision_model.head.probe": torch.zeros(1)}, weights)
    (result / "preprocessor_config.json").unlink()
    assert keye.load(result).notes == (
        "config.json has keys without meaning to keye: apple, zebra",
        "preprocessor_config.json is missing: media are prepared by the official values of Keye-VL 2.0",
        "the files hold no indexer weights: the model attends densely",
        "the files hold tensors that no forward pass reads: visual.vision_model.head.probe",
        "the checkpoint brings no chat template: prompts follow keye's own for Keye-VL 2.0",
        "the checkpoint brings no frame_text: frames are labelled as Keye-VL 1.5 does it",
    )


def test_unused_tensors_are_noted_the_first_few_by_name(own: Callable[..., Path]) -> None:
    (note,) = keye.load(own(sa_config=None)).notes
    assert note.startswith("the files hold tensors that this model has no place for: model.layers.0.self_attn.sa_index")
    assert note.endswith(" and 7 more")


def test_weights_that_compute_nan_end_with_a_sentence(own: Callable[..., Path]) -> None:
    result = own()
    tensors = load_file(result / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite, or it would be an error of loading
    save_file(tensors, result / "model.safetensors")
    broken = keye.load(result)
    with pytest.raises(KeyeError, match="the model computes NaN"):
        broken.ask(Frames(FRAMES), "what?")
    with pytest.raises(KeyeError, match="the model computes NaN"):
        evaluate(broken.runtime, EvalOptions(questions=1))


# Mistakes of a request


@pytest.mark.usefixtures("_nothing_is_opened")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"stop": 5}, "stop is 5; it must be at most 256 strings that are not empty"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"colour": "red"}, "unknown option colour"),
        ({"thinking": "hard"}, "thinking is 'hard'; give true, false or nothing"),
        ({"tools": [{"name": "a b"}]}, "has the name 'a b'"),
        ({"media_options": {"foo": 1}}, "foo is not an option of videos"),
        ({"media_options": {1: 1}}, "1 is not an option of videos"),
        ({"media_options": 5}, "media_options is a int; give a dictionary"),
        ({"media_options": {"fps": "fast"}}, "fps is 'fast'; it must be above 0"),
        ({"media_options": {"max_frames": 2.5}}, "max_frames is 2.5; it must be a whole number"),
        ({"media_options": {"strict_official": "yes"}}, "strict_official is 'yes'; give true or false"),
    ],
)
def test_mistakes_are_reported_before_any_work(model: Keye, options: dict[str, Any], sentence: str) -> None:
    for start in (model.stream_ask, model.stream_ground):
        with pytest.raises(KeyeError, match=sentence):
            start(Frames(FRAMES), "the circle", **options)


@pytest.mark.usefixtures("_nothing_is_opened")
@pytest.mark.parametrize(
    ("media", "question", "options", "sentence"),
    [
        (None, "what?", {}, "a medium must be a path, .*, not NoneType"),
        (5, "what?", {}, "not int"),
        ([], "what?", {}, "no medium was given"),
        ([PICTURE, None], "what?", {}, "not NoneType"),
        (PICTURE, None, {}, "the question is empty"),
        (PICTURE, ["what?"], {}, "the question is empty"),
        (PICTURE, "what?", {"media_options": {"fps": 1}}, "fps is not an option of images"),
        (Medium("video", FRAMES, {"fps": 1}), "what?", {"media_options": {"fps": 2}}, "fps stand beside a medium"),
    ],
)
def test_media_and_questions_that_cannot_be(
    model: Keye, media: object, question: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KeyeError, match=sentence):
        model.stream_ask(media, question, **options)


@pytest.mark.usefixtures("_nothing_is_opened")
def test_messages_are_checked_before_any_work(model: Keye, video: Path) -> None:
    part = {"type": "video", "video": str(video), "max_frames": 2.5}
    with pytest.raises(KeyeError, match="max_frames is 2.5; it must be a whole number"):
        model.stream([{"role": "user", "content": [part, "what?"]}])
    with pytest.raises(KeyeError, match="give at least one message"):
        model.stream([])


@pytest.mark.usefixtures("_nothing_is_opened")
@pytest.mark.parametrize(
    ("media", "event", "sentence"),
    [
        (PICTURE, "the circle", "an image was given to ground; give a video, or use ask for images"),
        ([Frames(FRAMES), Frames(FRAMES)], "the circle", "2 media were given to ground; give one video"),
        ([], "the circle", "0 media were given to ground; give one video"),
        (Frames(FRAMES), " ", "the event is empty"),
        (Frames(FRAMES), None, "the event is empty"),
    ],
)
def test_ground_takes_one_video(model: Keye, media: object, event: Any, sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        model.ground(media, event)


# The context


@pytest.mark.usefixtures("_nothing_is_opened")
def test_a_video_too_long_for_the_context_is_not_decoded(
    model: Keye, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> Iterator[None]:
        raise AssertionError("frames were decoded")

    monkeypatch.setattr(VideoReader, "frames", decode)
    options = {"nframes": 8, "min_pixels": 2000 * 28 * 28}
    with pytest.raises(KeyeError, match=r"takes at least \d+ tokens, \d+ of them visual.* the context holds 16384"):
        model.ask([video, video], "what?", media_options=options)


@pytest.mark.usefixtures("_nothing_is_opened")
def test_an_image_too_large_for_the_context_is_not_decoded(model: Keye, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "red.png")
    with pytest.raises(KeyeError, match="of them visual.* the context holds 16384"):
        model.ask(tmp_path / "red.png", "what?", media_options={"min_pixels": 17_000 * 28 * 28})


def test_pictures_in_memory_are_counted_too(model: Keye) -> None:
    with pytest.raises(KeyeError, match="takes .* of them visual.* the context holds 16384"):
        model.ask(PICTURE, "what?", max_tokens=16_384 - 25)  # 23 tokens of text fit, the 4 of the picture do not


def test_times_of_frames_may_be_an_option(model: Keye) -> None:
    times = [0.0, 1.0, 2.0, 3.5]
    options = {"media_options": {"timestamps": times}, "max_tokens": 1}
    for frames in (Frames(FRAMES), Frames(FRAMES, times)):
        assert model.ask(frames, "what?", **options).plan[0]["timestamps"] == times


def test_the_estimate_is_the_prompt(model: Keye, video: Path) -> None:
    """What is refused before decoding is what would be refused after: to the token, for 2.0."""
    used = model.ask(video, "what?", max_tokens=1).usage.prompt_tokens
    with pytest.raises(KeyeError, match=f"takes at least {used} tokens"):
        model.ask(video, "what?", max_tokens=16_384 - used + 1)


@pytest.mark.parametrize("release", ["preview", "1.5", "2.0"])
@pytest.mark.parametrize("options", [{}, {"nframes": 6}, {"max_pixels": 20_000}, {"video_total_pixels": 60_000}])
def test_the_plan_never_counts_more_than_the_medium_takes(video: Path, release: Any, options: dict[str, Any]) -> None:
    processor = Processor(ProcessorConfig.of(release, video_min_tokens=4))
    planned = plan_medium(as_medium(str(video), options), processor)
    item = processor.video(planned.source, planned.options)
    assert 0 < planned.visual_tokens <= item.visual_tokens
    if release != "1.5":  # whose fast frames are classified by their pixels
        assert planned.pieces == item.pieces


# Streams


def test_a_stream_is_an_iterator(model: Keye) -> None:
    stream = model.stream_ask(Frames(FRAMES), "what?", max_tokens=8)
    first = next(stream)
    assert isinstance(first, str) and iter(stream) is stream
    rest = "".join(stream)
    assert stream.answer is not None and stream.finish() is stream.answer
    assert stream.answer.text == parse_reply(first + rest).text
    with pytest.raises(StopIteration):
        next(stream)


def test_grounding_streams_and_merges(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keye.sessions.answer.parse_reply", lambda _: parse_reply("[[5.0, 7.0], [1.0, 2.0], [6.0, 9.0]]")
    )
    stream = model.stream_ground(Frames(FRAMES, [0.0, 3.0, 6.0, 9.0]), "the circle", max_tokens=4)
    assert "".join(stream)
    assert stream.finish().intervals == ((1.0, 2.0), (5.0, 9.0))
    shorter = model.ground(Frames(FRAMES, [0.0, 1.0, 2.0, 3.0]), "the circle", max_tokens=4)
    assert shorter.intervals == ((1.0, 2.0),) and "not shown as a moment" in shorter.notes[0]
    assert shorter.to_dict()["notes"] == list(shorter.notes)
    assert model.ground(Frames(FRAMES), "the circle", max_tokens=4).intervals == ((1.0, 2.0), (5.0, 9.0))
