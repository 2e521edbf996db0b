"""Live sessions: frames that come one by one give what one video of all of them gives; what happens when it is full."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import keye
from keye import Frames, Keye, KeyeError
from keye.chat.messages import Message
from keye.config import ProcessorConfig
from keye.data.frameforge import make_clip, write_mp4
from keye.engine.media import as_medium
from keye.engine.prompt import Prompt
from keye.engine.runtime import Runtime
from keye.media.processor import Processor
from keye.sessions.live import LiveSession
from tests.support.reference import PlainSequence

FRAMES = np.random.default_rng(0).integers(0, 256, (40, 56, 56, 3), dtype=np.uint8)
TIMES = [0.5 * i for i in range(40)]
SIZE = {"resized_height": 56, "resized_width": 56}


@pytest.fixture(scope="module")
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


def logits_of(model: Keye, session: LiveSession, question: str) -> torch.Tensor:
    """Logits of the first token of an answer."""
    prompt = session.request(question, max_tokens=1).prompt
    assert isinstance(prompt, Prompt)
    return PlainSequence(model.model).prefill(prompt).logits


def logits_of_video(model: Keye, frames: NDArray[np.uint8], times: list[float], question: str) -> torch.Tensor:
    message = Message("user", (as_medium(Frames(frames, times), SIZE), question))
    return PlainSequence(model.model).prefill(model.runtime.prompts.build([message])).logits


def test_frames_one_by_one_are_one_video(model: Keye) -> None:
    session = model.live(**SIZE)
    for start, stop in ((0, 1), (1, 4), (4, 40)):
        session.append(FRAMES[start:stop], TIMES[start:stop])
        item = logits_of_video(model, FRAMES[:stop], TIMES[:stop], "what is this?")
        assert torch.allclose(logits_of(model, session, "what is this?"), item, atol=1e-5)
    assert session.frames == 40 and session.times == tuple(TIMES)


def test_frames_have_the_size_that_the_session_asks_for(model: Keye) -> None:
    """Also beyond the limits of the model's files; and the stream goes on where the oldest frames are forgotten."""
    most = model.processor.config.video_max_tokens * model.processor.config.token_pixels
    session = small(model, 600).live(keep="recent", reserve=50, min_pixels=2 * most, max_pixels=3 * most)
    session.append(FRAMES[:12], TIMES[:12])
    session.append(FRAMES[12:20], TIMES[12:20])
    assert session.dropped and session.ask("what?", max_tokens=2).usage.completion_tokens <= 2
    prompt = session.request("what?", max_tokens=1).prompt
    assert isinstance(prompt, Prompt)
    tokens = prompt.visual_tokens
    assert tokens == int((prompt.token_ids == model.config.video_token_id).sum())
    assert tokens >= 2 * model.processor.config.video_max_tokens * session.frames


def test_answers_do_not_disturb_the_stream(model: Keye) -> None:
    request, silent = model.live(**SIZE), model.live(**SIZE)
    for start in range(0, 12, 3):
        for session in (request, silent):
            session.append(FRAMES[start : start + 3], TIMES[start : start + 3])
        stream = request.stream_ask("what?", max_tokens=5)
        next(stream, None)  # left in the middle
        answer = request.ask("what?", max_tokens=5)
    assert request.tokens == silent.tokens
    assert torch.equal(logits_of(model, request, "when?"), logits_of(model, silent, "when?"))
    total = model.ask(Frames(FRAMES[:12], TIMES[:12]), "what?", media_options=SIZE, max_tokens=5)
    assert (answer.text, replace(answer.usage, cached_tokens=0)) == (total.text, total.usage)
    assert answer.usage.cached_tokens == request.tokens, "what was seen is not computed again"
    assert answer.plan == total.plan


def test_an_answer_has_evidence(model: Keye) -> None:
    session = model.live(**SIZE)
    session.append(FRAMES[:8], TIMES[:8])
    evidence = session.ask("what?", max_tokens=3, evidence=True).evidence
    total = model.ask(Frames(FRAMES[:8], TIMES[:8]), "what?", media_options=SIZE, max_tokens=3, evidence=True).evidence
    assert evidence is not None and evidence == total


def test_a_file_is_appended_with_its_times(model: Keye, tmp_path: Path) -> None:
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), tmp_path / "short.mp4", (112, 112))
    session = model.live(fps=2)
    session.append_video(tmp_path / "short.mp4")
    session.append_video(tmp_path / "short.mp4", offset=60.0)
    assert session.times == tuple(start + 0.5 * i for start in (0.0, 60.0) for i in range(8))


def small(model: Keye, context: int) -> Keye:
    """The same model with room for few tokens."""
    network = copy.copy(model.model)
    text = replace(model.config.text, max_position_embeddings=context)
    network.config = replace(model.config, text=text)
    return keye.Keye(Runtime.create(model.name, network, model.tokenizer, model.processor))


def test_a_full_context_is_an_error_and_nothing_is_lost(model: Keye) -> None:
    session = small(model, 200).live(reserve=50, **SIZE)
    room = (150 - session.tokens) // 10  # a frame is a label of six tokens and four visual ones
    session.append(FRAMES[:room], TIMES[:room])
    with pytest.raises(KeyeError, match=r"the context is full: it holds \d+ frames in \d+ of 200 tokens, and 50 are"):
        session.append(FRAMES[room:], TIMES[room:])
    assert 0 < session.tokens <= 150
    before = session.frames
    assert session.ask("what?", max_tokens=2).usage.completion_tokens <= 2 and session.frames == before


def test_recent_frames_are_as_if_the_video_began_with_them(model: Keye) -> None:
    session = small(model, 200).live(keep="recent", reserve=50, **SIZE)
    for frame, time in zip(FRAMES, TIMES, strict=True):
        session.append(frame[None], [time])
        assert session.tokens <= 150
    assert session.dropped > 0 and session.dropped + session.frames == 40
    first = session.dropped
    assert session.times == tuple(TIMES[first:])
    item = logits_of_video(model, FRAMES[first:], TIMES[first:], "what?")
    assert torch.allclose(logits_of(model, session, "what?"), item, atol=1e-5)


def test_the_past_is_in_the_ledger_of_the_model(folder: Path) -> None:
    """In the formats of the model, and under its budget; what is kept for later requests goes first."""
    model = keye.load(folder, dtype="float32", kv="int8")
    model.chat([Message("user", ("word " * 200,))], max_tokens=1)
    scratch = model.core.scheduler.scratch.least
    model.runtime.ledger.budget = model.runtime.ledger.used() + model.runtime.store.slab_bytes // 2 + scratch
    session = model.live(**SIZE)
    session.append(FRAMES[:2], TIMES[:2])
    assert session.request("what?", max_tokens=1).prompt.past.store is model.runtime.store  # type: ignore[union-attr]
    assert len(model.runtime.prefixes) > 0
    with pytest.raises(KeyeError, match="more are needed for kv"):
        session.append(np.concatenate([FRAMES] * 20), [100.0 + i for i in range(800)])
    assert len(model.runtime.prefixes) == 0 and 2 < session.frames < 802
    del session
    assert model.runtime.ledger.used() == 0


@pytest.mark.parametrize(
    ("frames", "times", "sentence"),
    [
        (FRAMES[:2], [2.0], "2 frames have 1 timestamps"),
        (FRAMES[:2], [3.0, 3.0], "timestamps must ascend"),
        (FRAMES[:1], [0.5], "timestamps must ascend"),
        ([], [], "frames must be an array"),
    ],
)
def test_frames_that_cannot_be_appended(model: Keye, frames: Any, times: list[float], sentence: str) -> None:
    session = model.live(**SIZE)
    session.append(FRAMES[:2], [0.0, 1.0])
    with pytest.raises(KeyeError, match=sentence):
        session.append(frames, times)
    assert session.frames == 2


def test_sessions_that_cannot_be(model: Keye) -> None:
    with pytest.raises(KeyeError, match="keep is 'some'; choose one of all, recent"):
        model.live(keep="some")  # type: ignore[arg-type]
    with pytest.raises(KeyeError, match="foo is not an option of videos"):
        model.live(foo=1)
    with pytest.raises(KeyeError, match="reserve is 0"):
        model.live(reserve=0)
    with pytest.raises(KeyeError, match="no frame was appended yet"):
        model.live().ask("what?")
    other = keye.Keye(Runtime.create(model.name, model.model, model.tokenizer, Processor(ProcessorConfig.of("1.5"))))
    with pytest.raises(KeyeError, match="live sessions need a model of Keye-VL 2.0"):
        other.live()


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -float("inf"), 10**400, None, "x", np.float32("nan")])
def test_times_that_are_no_seconds_leave_the_session_as_it_was(model: keye.Keye, time: Any) -> None:
    session = model.live(max_pixels=12_544)
    picture = np.zeros((1, 112, 112, 3), np.uint8)
    with pytest.raises(KeyeError, match="timestamps must be finite numbers of seconds"):
        session.append(picture, [time])
    session.append(picture, [5.0])
    assert session.times == (5.0,)
    with pytest.raises(KeyeError, match="offset must be finite numbers of seconds"):
        session.append_video("missing.mp4", offset=float("nan"))


def test_a_closed_session_takes_nothing_more(model: keye.Keye) -> None:
    session = model.live(max_pixels=12_544)
    picture = np.zeros((1, 112, 112, 3), np.uint8)
    session.append(picture, [1.0])
    session.close()
    for use in (
        lambda: session.append(picture, [2.0]),
        lambda: session.append_video("missing.mp4"),
        lambda: session.ask("what?"),
    ):
        with pytest.raises(KeyeError, match="the live session is closed"):
            use()


def test_frames_beyond_the_context_are_refused_before_they_are_resized(model: keye.Keye) -> None:
    session = model.live(min_pixels=2e8, max_pixels=2e8)
    with pytest.raises(KeyeError, match="tokens of new frames do not fit the context"):
        session.append(np.zeros((2, 112, 112, 3), np.uint8), [1.0, 2.0])


def test_a_stream_goes_on_beside_any_number_of_replies(folder: Path) -> None:
    model = keye.load(folder, dtype="float32")
    model.core.scheduler.most_running = 0  # as if that many replies were running
    session = model.live(**SIZE)
    session.append(FRAMES[:2], TIMES[:2])
    assert session.frames == 2


def test_a_stream_that_cannot_be_computed_again_is_empty_and_goes_on(model: Keye) -> None:
    limited = small(model, 200)
    session = limited.live(keep="recent", reserve=50, **SIZE)
    limited.runtime.ledger.budget, count = 1 << 40, 0
    while not session.dropped:
        before = session.frames
        if before and session.tokens * (before + 1) // before > 150:
            limited.runtime.ledger.budget = 1
            with pytest.raises(KeyeError):
                session.append(FRAMES[count : count + 1], TIMES[count : count + 1])
            break
        session.append(FRAMES[count : count + 1], TIMES[count : count + 1])
        count += 1
    limited.runtime.ledger.budget = None
    session.append(FRAMES[count + 1 : count + 2], TIMES[count + 1 : count + 2])
    assert session.frames + session.dropped in (count + 1, count + 2)
