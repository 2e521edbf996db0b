"""Evidence: which frames were selected while an answer was written, and what is said when nothing was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import keye
from keye import Frames, Keye
from keye.chat.messages import Medium, Message
from keye.data.frameforge import make_clip, render
from keye.engine.engine import Engine
from keye.engine.evidence import Evidence, MediumEvidence, counted_layers, frame_spans, make_evidence
from keye.engine.media import as_medium
from keye.engine.prompt import Prompt, PromptBuilder
from keye.engine.request import Finished
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.media.processor import Processor
from keye.sessions.answer import Answer, stream_answer
from keye.sessions.pictures import WIDTH, draw_evidence
from tests.support.reference import PlainSequence
from tests.support.tiny import tiny_folder, tiny_model

FRAMES = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
TIMES = [0.5 * i for i in range(8)]


@pytest.fixture(scope="module")
def tiny() -> Runtime:
    return tiny_model(topk=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Keye:
    return keye.load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"), dtype="float32")


def prompt_of(tiny: Runtime, *media: object) -> Prompt:
    builder = PromptBuilder(tiny.model.config, tiny.tokenizer, Processor(tiny.processor.config))
    return builder.build([Message("user", (*map(as_medium, media), "what?"))])


def test_selections_are_attributed_to_the_frames_that_hold_them(tiny: Runtime) -> None:
    prompt = prompt_of(tiny, Frames(FRAMES, TIMES), Image.new("RGB", (56, 56)))
    video, image = frame_spans(prompt)
    counts = torch.zeros(2, prompt.token_ids.shape[0] + 5, dtype=torch.int64)
    counts[:, video[2][0]] = 6
    counts[:, video[5][1] - 1] = 2
    counts[:, video[5][1]] = 100  # the text of the next frame
    counts[:, image[0][0]] = 8
    result = make_evidence(counts, 3, prompt, tiny.model.config)
    frames, picture = result.media
    assert result.reason is None and result.steps == 3
    assert frames.shares == (0, 0, 0.75, 0, 0, 0.25, 0, 0) and frames.times == tuple(TIMES)
    assert frames.lifts[2] == 6.0 and frames.top() == [2, 5] and frames.top(1) == [2]
    assert picture.shares == (1.0,) and picture.share == frames.share == 0.5
    assert result.to_dict()["media"][0]["top"] == [2, 5]


def test_counts_are_those_of_the_steps_that_write_the_reply(tiny: Runtime) -> None:
    """What is counted for the first token is what the last token of the prompt selects, k keys in every layer."""
    prompt = prompt_of(tiny, Frames(FRAMES, TIMES))
    engine = Engine(tiny)
    request = replace(
        engine.generate_request(prompt, SamplingParams(max_tokens=3), ignore_eos=True, indexer_sets=True), evidence=True
    )
    *_, (_, finished) = engine.run([request])
    counting = PlainSequence(tiny.model, count=True).prefill(prompt)
    assert counting.counts is not None
    assert counting.counts.sum(1).tolist() == [16, 16] and counting.counts.max() == 1
    counting.greedy(2)
    assert counting.counts.sum(1).tolist() == [48, 48]
    assert isinstance(finished, Finished)
    assert finished.evidence == make_evidence(counting.counts, 3, prompt, tiny.model.config)


def test_an_answer_carries_evidence_on_request(model: Keye) -> None:
    assert model.ask(Frames(FRAMES, TIMES), "what?", max_tokens=3).evidence is None
    answer = model.ask(Frames(FRAMES, TIMES), "what?", max_tokens=3, temperature=1.0, seed=1, evidence=True)
    assert answer.evidence is not None and answer.evidence.reason is None and answer.evidence.steps == 3
    (medium,) = answer.evidence.media
    assert sum(medium.shares) == pytest.approx(1.0) and len(medium.lifts) == 8
    assert answer.to_dict()["evidence"] == answer.evidence.to_dict()


def test_without_selection_there_is_a_reason(model: Keye, tiny: Runtime) -> None:
    dense = model.ask(Frames(FRAMES), "what?", max_tokens=1, attention="dense", evidence=True).evidence
    assert dense is not None and dense.media == () and "attention was dense" in str(dense.reason)
    short = tiny_model(topk=4096)
    prompt = prompt_of(short, Frames(FRAMES))
    counts = torch.zeros(2, prompt.length + 1, dtype=torch.int64)
    result = make_evidence(counts, 0, prompt, short.model.config)
    assert (
        result.reason
        == "the context is not longer than the 4,096 tokens that the indexer selects: every token was read"
    )
    assert model.chat([{"role": "user", "content": "hello"}], max_tokens=1, evidence=True).evidence == Evidence(
        (), 0, "the request has no media"
    )


def test_the_lowest_third_of_the_layers_is_left_out() -> None:
    assert [counted_layers(n).start for n in (1, 2, 6, 48)] == [0, 0, 2, 16]


# The picture


def evidence_of(frames: int) -> Evidence:
    lifts = [0.5] * frames
    lifts[frames // 2] = frames / 2
    shares = tuple(lift / frames for lift in lifts)
    times = tuple(0.5 * i for i in range(frames))
    return Evidence((MediumEvidence("video", "clip.mp4", times, shares, tuple(lifts), 1.0),), 3)


def colours(picture: Image.Image) -> set[object]:
    return {colour for _, colour in picture.getcolors(1 << 20) or []}


@pytest.mark.parametrize("frames", [1, 2, 8, 2000])
def test_a_timeline_of_any_length(frames: int) -> None:
    thumbnails = {0: {frames // 2: Image.new("RGB", (64, 36), (1, 2, 3))}}
    picture = draw_evidence(evidence_of(frames), "when?", "[[1.0, 2.0]]", [(1.0, 2.0)], thumbnails)
    assert picture.width == WIDTH and picture.height < 800
    assert (1, 2, 3) in colours(picture) or frames == 1


def test_a_picture_says_why_there_is_no_evidence(tmp_path: Path) -> None:
    plain = draw_evidence(Evidence((), 0), "when?", "now", [])
    events = draw_evidence(Evidence((), 0, "attention was dense"), "when? 日本", "", [])
    assert events.height > plain.height and (213, 94, 0) in colours(events)


def test_an_indexed_video_has_the_evidence_of_the_video(tmp_path: Path) -> None:
    model, clip = keye.load("nano"), make_clip(3, frames=16, objects=2)
    video = Frames(render(clip), clip.timestamps)
    model.index(video, tmp_path / "clip.keye")
    events = [
        model.ask(medium, "when is the first object visible?", evidence=True, max_tokens=6).evidence
        for medium in (tmp_path / "clip.keye", video)
    ]
    assert events[0] is not None and events[1] is not None
    ours, theirs = events[0].media[0], events[1].media[0]
    assert (ours.times, ours.kind) == (theirs.times, "video") and len(ours.shares) == 16
    assert max(abs(a - b) for a, b in zip(ours.shares, theirs.shares, strict=True)) < 0.02


def test_an_empty_answer_rests_on_no_frame(model: Keye) -> None:
    """Its only step says that there is nothing to say."""
    request = model.request([Message("user", (Medium("video", Frames(FRAMES)), "what?"))], evidence=True, max_tokens=5)
    first = model.ask(Frames(FRAMES), "what?", max_tokens=1, ignore_eos=True, logprobs=0).logprobs
    assert first is not None
    stopping = replace(request, params=replace(request.params, stop_token_ids=(first[0].token,)))
    answer = stream_answer(model.engine, stopping).finish()
    assert isinstance(answer, Answer) and (answer.text, answer.usage.completion_tokens) == ("", 0)
    assert answer.evidence is not None and answer.evidence.media == ()
    assert answer.evidence.reason == "the answer is empty: it rests on no frame"
