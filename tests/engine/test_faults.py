"""What goes wrong in the engine ends the request that it concerns, and no other; nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.ledger import OutOfMemory
from keye.cache.tiers import FILE_BLOCKS
from keye.chat.messages import Message
from keye.data.frameforge import make_clip, write_mp4
from keye.engine.async_engine import AsyncEngine
from keye.engine.generate import Decoding, generate
from keye.engine.media import as_medium
from keye.engine.media_loader import AHEAD
from keye.engine.request import Delta, Failed, Finished, Generating, Inbox, LoadingMedia, Ready, Request, Running
from keye.engine.scheduler import MOST_STRETCH, STRETCH, StepTimer, is_fragmented, split_budget
from keye.engine.step import Slice, run_slices
from keye.engine.vision import VisionJob
from keye.errors import KeyeWarning
from keye.media import frame_stream
from keye.media.processor import Processor
from keye.models.keye import KeyeModel
from tests.support.tiny import tiny_folder

TEXT = [Message("user", ("what is red?",))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames in four seconds."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


def about(medium: object, question: str = "what is red?") -> list[Message]:
    return [Message("user", (as_medium(medium), question))]


def clip(seed: int, frames: int = 8) -> Frames:
    return Frames(np.random.default_rng(seed).integers(0, 255, (frames, 56, 56, 3), dtype=np.uint8))


def greedy(model: Keye, messages: list[Message], max_tokens: int = 6, **options: Any) -> Request:
    return model.request(messages, max_tokens=max_tokens, ignore_eos=True, **options)


def alone(model: Keye, messages: list[Message], max_tokens: int = 6) -> list[int]:
    """Greedy tokens of the reference: one sequence, nothing cached."""
    request = greedy(model, messages, max_tokens)
    decoding = Decoding(model.model)
    decoding.prefill(model.runtime.prompts.lay_out(request.prompt))  # type: ignore[arg-type]
    return list(generate(decoding, request.params, ()))


def laid_out(model: Keye, request: Request) -> Request:
    return replace(request, prompt=model.runtime.prompts.lay_out(request.prompt))  # type: ignore[arg-type]


def add(model: Keye, request: Request) -> Inbox:
    inbox = Inbox()
    model.core.add(request, inbox)
    return inbox


def run(model: Keye) -> None:
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()


def ran(model: Keye, request: Request) -> Inbox:
    inbox = add(model, request)
    run(model)
    return inbox


def tokens(inbox: Inbox) -> list[int]:
    assert isinstance(inbox.events[-1], Finished), inbox.events[-1]
    return [token for event in inbox.events if isinstance(event, Delta) and event.index == 0 for token in event.tokens]


def failure(inbox: Inbox) -> str:
    last = inbox.events[-1]
    assert isinstance(last, Failed)
    return str(last.error)


def nothing_held(model: Keye) -> bool:
    model.clear_caches()
    return model.runtime.ledger.accounts() == {}


# Media


def test_a_decode_worker_killed_in_the_middle_fails_its_request_alone(
    model: Keye, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = frame_stream._fill

    def killed(reader: Any, frames: Callable[[Any], Iterator[Any]], queue: Any) -> None:
        def some(opened: Any) -> Iterator[Any]:
            for number, frame in enumerate(frames(opened)):
                if number == 1:
                    os.kill(opened._worker.process.pid, signal.SIGKILL)
                yield frame

        fill(reader, some, queue)

    bad_request, good_request = greedy(model, about(video)), greedy(model, TEXT)
    monkeypatch.setattr(frame_stream, "_fill", killed)
    bad, good = add(model, bad_request), add(model, good_request)
    run(model)
    assert "the video decoder of short.mp4 was ended from outside" in failure(bad)
    assert tokens(good) == alone(model, TEXT)
    monkeypatch.undo()
    assert model.ask(video, "what is red?", max_tokens=2).usage.media_tokens == 8 * 16
    assert nothing_held(model)


@pytest.mark.parametrize("where", ["frames", "open", "lay out"])
def test_a_defect_in_media_is_told_to_who_asked(
    model: Keye, video: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A defect is no `KeyeError`; the engine lives on all the same."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the video decoder failed with code 1")

    if where == "frames":
        monkeypatch.setattr(VisionJob, "step", fail)
    elif where == "open":
        monkeypatch.setattr(frame_stream.FileReader, "__init__", fail)
    else:
        monkeypatch.setattr(Processor, "video_stream", fail)
    bad, good = add(model, greedy(model, about(video))), add(model, greedy(model, TEXT))
    run(model)
    assert "failed with code 1" in failure(bad)
    assert tokens(good) == alone(model, TEXT)
    assert nothing_held(model)


def test_media_that_do_not_come_hold_up_nobody_else(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a prompt of words behind more slow media than there are threads for them."""
    come = threading.Event()
    frames = Processor.frames

    def slow(self: Processor, *given: Any) -> Any:
        if threading.current_thread().name.startswith("keye-media"):
            come.wait()
        return frames(self, *given)

    monkeypatch.setattr(Processor, "frames", slow)
    waiting = [add(model, greedy(model, about(clip(seed)))) for seed in range(12)]
    words = add(model, greedy(model, TEXT))
    while not (words.events and isinstance(words.events[-1], Finished | Failed)):
        if not model.core.step():
            model.core.wait_for_work()
    assert tokens(words) and not any(isinstance(event, Finished) for inbox in waiting for event in inbox.events)
    come.set()
    run(model)
    assert [len(tokens(inbox)) for inbox in waiting] == [6] * 12


def test_few_media_are_open_before_their_turn(model: Keye) -> None:
    """Pictures that wait are held in memory."""
    model.core.scheduler.most_running, most = 1, 0
    inboxes = [add(model, greedy(model, about(clip(seed % 3)), 2)) for seed in range(30)]
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
        most = max(most, sum(isinstance(task.state, LoadingMedia | Ready) for task in model.core.tasks))
    assert most == AHEAD and all(len(tokens(inbox)) == 2 for inbox in inboxes)


# Memory


def test_visual_tokens_wait_for_room(model: Keye) -> None:
    """Two clips whose visual tokens do not fit beside each other, nor beside all keys and values."""
    model.runtime.vision_cache.budget = 0
    asked = [about(clip(seed, 60)) for seed in range(3)]
    expected = [alone(model, messages) for messages in asked]
    one = 60 * 4 * model.config.text.hidden_size * 4  # bytes of the visual tokens of a clip
    model.runtime.ledger.budget = 2 * model.runtime.store.slab_bytes + one // 2 + model.core.scheduler.scratch.least
    inboxes = [add(model, greedy(model, messages)) for messages in asked]
    run(model)
    assert [tokens(inbox) for inbox in inboxes] == expected
    assert nothing_held(model)


def test_one_whose_blocks_are_scattered_begins_anew_before_it_fails(model: Keye) -> None:
    """Its blocks lie in two slabs because another was there first; in one it has room."""
    messages = [Message("user", ("word " * 500,))]
    other = add(model, greedy(model, [Message("user", ("a " * 700,))], 30))
    while not any(isinstance(task.state, Generating) for task in model.core.tasks):
        if not model.core.step():
            model.core.wait_for_work()
    inbox = add(model, greedy(model, messages, 12))
    while not any(isinstance(task.state, Generating) and task.number == 1 for task in model.core.tasks):
        if not model.core.step():
            model.core.wait_for_work()
    model.core.abort(model.core.tasks[0])
    model.clear_caches()
    task = model.core.tasks[0]
    held = model.runtime.store.nbytes() // model.runtime.store.slab_bytes
    assert is_fragmented(task.state) and held == 2 and not isinstance(other.events[-1], Finished)
    model.runtime.ledger.budget = model.runtime.store.slab_bytes + model.core.scheduler.scratch.least

    def full() -> None:
        if not task.retried:
            raise OutOfMemory("full")

    assert model.core.scheduler.make_room(full, task) is None and task.retried
    run(model)
    assert tokens(inbox) == alone(model, messages, 12)
    assert nothing_held(model)


def test_the_choices_of_one_may_take_the_room_of_a_younger_prompt(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older's prompt is complete in the very step that computes a part of the younger's."""
    old, young = [Message("user", ("word " * 60,))], [Message("user", ("other " * 30,))]
    expected = alone(model, old), alone(model, young)
    monkeypatch.setattr(StepTimer, "token_budget", lambda *_: 120)
    model.runtime.ledger.budget = model.runtime.store.slab_bytes + model.core.scheduler.scratch.least
    # Laid out before, so that both begin in the same step however slow the thread that would do it.
    first, second = (add(model, laid_out(model, one)) for one in (greedy(model, old, n=13), greedy(model, young)))
    run(model)
    assert model.core.scheduler.preemptions > 0
    assert (tokens(first), tokens(second)) == expected
    assert nothing_held(model)


def test_a_mapped_store_is_not_bound_by_the_memory_budget(folder: Path, tmp_path: Path) -> None:
    """Only the indexer keys are in memory; keys and values lie on the disk."""
    model = keye.load(folder, dtype="float32", kv_tier="file", kv_folder=tmp_path)
    text = [Message("user", ("word " * 300,))]
    near = FILE_BLOCKS * model.runtime.store.layout.scanned_block_bytes
    model.runtime.ledger.budget = near + model.core.scheduler.scratch.least
    assert near < model.runtime.store.slab_bytes
    inbox = add(model, greedy(model, text, 2))
    run(model)
    assert len(tokens(inbox)) == 2
    model.clear_caches()
    model.runtime.ledger.budget = near - 1 + model.core.scheduler.scratch.least
    with pytest.raises(KeyeError, match="enough for 0 tokens"):
        model.chat(text, max_tokens=2)


def test_what_is_told_of_a_preempted_request_is_told_once(model: Keye) -> None:
    """Evidence and the probabilities of the prompt are those of an undisturbed run."""

    def asked(disturbed: bool) -> Finished:
        inbox = add(model, replace(greedy(model, about(clip(1)), 8, evidence=True), prompt_logprobs=0))
        steps = 0
        while not model.core.is_idle():
            if not model.core.step():
                model.core.wait_for_work()
                continue
            steps += 1
            for task in model.core.tasks if disturbed and steps in (2, 6) else ():
                model.core.scheduler.preempt(task)
        return inbox.events[-1]  # type: ignore[return-value]

    plain = asked(disturbed=False)
    model.clear_caches()
    again = asked(disturbed=True)
    assert model.core.scheduler.preemptions >= 1
    assert plain.evidence is not None and again.evidence is not None
    assert again.evidence.steps == plain.evidence.steps == 8
    assert again.evidence.media[0].shares == pytest.approx(plain.evidence.media[0].shares)
    assert len(again.prompt_probs or ()) == len(plain.prompt_probs or ()) == plain.prompt_tokens - 1


def test_deterministic_replies_survive_a_preemption_to_the_last_bit(folder: Path) -> None:
    """In bfloat16, where the shape of a product decides its last bits."""
    model = keye.load(folder)

    def probabilities(disturbed: bool) -> list[float]:
        inbox = add(model, greedy(model, about(clip(1, 30)), 16, deterministic=True, logprobs=0))
        steps = 0
        while not model.core.is_idle():
            if not model.core.step():
                model.core.wait_for_work()
            steps += 1
            for task in model.core.tasks if disturbed and steps >= 7 and writes(model) else ():
                model.core.scheduler.preempt(task)
                disturbed = False
        return [prob.logprob for event in inbox.events if isinstance(event, Delta) for prob in event.probs]

    plain = probabilities(disturbed=False)
    assert probabilities(disturbed=True) == plain and len(plain) == 16 and model.core.scheduler.preemptions == 1


# Ends


def writes(model: Keye) -> bool:
    return any(isinstance(task.state, Generating) for task in model.core.tasks)


def test_an_answer_names_damage_that_only_decoding_showed(model: Keye, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"  # type: ignore[union-attr]
        for i in range(40):
            pixels = np.random.default_rng(i).integers(0, 256, (192, 320, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))  # type: ignore[union-attr]
        container.mux(stream.encode())  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    places = [place for place in range(len(data)) if data.startswith(b"00dc", place)]
    data[places[30] + 30 : places[31]] = bytes(places[31] - places[30] - 30)
    path.write_bytes(bytes(data))
    with pytest.warns(KeyeWarning, match="are damaged or missing: its pictures at"):
        notes = model.ask(path, "what is red?", media_options={"nframes": 40}, max_tokens=2).notes
    assert any("are damaged or missing: its pictures at 2.9 s" in note for note in notes)
    again = path.rename(tmp_path / "again.avi")  # read before under another name
    repeated = model.ask(again, "what is red?", media_options={"nframes": 40}, max_tokens=2).notes
    assert repeated == tuple(note.replace("clip.avi", "again.avi") for note in notes)
    path = again.rename(path)
    index = model.index(path, tmp_path / "clip.keye", media_options={"nframes": 40})
    assert "parts of the file are damaged or missing: its pictures at 2.9 s" in index.plan["notes"][-1]
    assert any("at 2.9 s" in note for note in model.ask(index.path, "what is red?", max_tokens=2).notes)
    with pytest.raises(KeyeError, match=r"clip.avi is damaged near 2.9 s; download it again or leave strict_media out"):
        model.ask(path, "what is red?", media_options={"nframes": 40, "strict_media": True}, max_tokens=2)


def run_async(model: Keye, work: Callable[[AsyncEngine], Any]) -> Any:
    engine = AsyncEngine(model.engine)
    engine.start()
    try:
        return asyncio.run(work(engine))
    finally:
        engine.close()


def test_closing_tells_those_who_still_wait(model: Keye) -> None:
    async def closed(engine: AsyncEngine) -> None:
        events = engine.run(greedy(model, about(clip(1)), 4000))
        await anext(events)
        await asyncio.to_thread(engine.close)
        with pytest.raises(KeyeError, match="is ending before the request was complete"):
            async for _ in events:
                pass

    run_async(model, closed)
    assert nothing_held(model)
    assert model.chat(TEXT, max_tokens=1).usage.completion_tokens <= 1, "the model goes on without that engine"


def test_a_defect_in_a_step_fails_its_requests_and_the_thread_goes_on(model: Keye) -> None:
    broken = iter([True])

    def fail_once(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        if next(broken, False):
            raise AssertionError("a defect")
        return run_slices(network, slices)

    model.core.run_slices = fail_once

    async def both(engine: AsyncEngine) -> list[Any]:
        with pytest.raises(AssertionError, match="a defect"):
            async for _ in engine.run(greedy(model, TEXT)):
                pass
        return [event async for event in engine.run(greedy(model, TEXT))]

    assert isinstance(run_async(model, both)[-1], Finished)


def test_a_request_names_a_mode_that_exists(model: Keye) -> None:
    with pytest.raises(KeyeError, match="choose sparse or dense"):
        replace(greedy(model, TEXT), attention="spares")  # type: ignore[arg-type]


def test_an_abort_during_the_last_step_is_cleaned_up(model: Keye) -> None:
    """An abort during the step of another thread ends nothing itself, and no step may follow."""
    task = model.core.add(greedy(model, about(clip(1)), 50), Inbox())
    while not isinstance(task.state, Generating):
        if not model.core.step():
            model.core.wait_for_work()

    def abort_meanwhile(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        other = threading.Thread(target=model.core.abort, args=(task,))
        other.start()
        other.join()
        return run_slices(network, slices)

    model.core.run_slices = abort_meanwhile
    model.core.step()
    assert model.core.is_idle() and task.has_ended
    assert nothing_held(model)


def test_a_stream_that_is_dropped_leaves_nothing(model: Keye) -> None:
    stream = model.stream_ask(clip(1), "what?", max_tokens=50, ignore_eos=True)
    next(stream)
    assert not model.core.is_idle()
    del stream
    assert model.core.is_idle() and nothing_held(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "n is 0; choose 1 to 128"),
        ({"n": "2"}, "n is '2'; choose 1 to 128"),
        ({"n": 2.5}, "n is 2.5; choose"),
        ({"logprobs": 21}, "logprobs is 21; choose 0 to 20"),
        ({"logprobs": True}, "logprobs is True; choose 0 to 20"),
    ],
)
def test_options_out_of_range(model: Keye, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        model.chat(TEXT, **options)


def test_probabilities_that_are_none_fail_their_request_alone(model: Keye) -> None:
    assert tokens(ran(model, greedy(model, TEXT, temperature=1e-320))) == alone(model, TEXT)
    bad, good = Inbox(), add(model, greedy(model, TEXT))
    spoiled = model.core.add(greedy(model, TEXT, temperature=1.0), bad)

    def spoil(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        mine = spoiled.state.caches if isinstance(spoiled.state, Running) else []
        return [
            torch.full_like(logits, torch.inf) if logits is not None and item.cache in mine else logits
            for item, logits in zip(slices, run_slices(network, slices), strict=True)
        ]

    model.core.run_slices = spoil
    run(model)
    assert "probability" in failure(bad) and tokens(good) == alone(model, TEXT)


# Fairness


def test_nobody_starves_whatever_the_steps_take() -> None:
    """Prompts come all the time while others write, on a machine of changing speed: each is complete in time."""
    rng = random.Random(0)
    timer, waiting, begun, number = StepTimer(), dict[int, int](), dict[int, int](), 0
    total, longest = 0, 0
    for step in range(4000):
        if rng.random() < 0.02 and len(waiting) < 40:
            waiting[number], begun[number] = rng.choice([3, 40, 400, 4000]), step
            number += 1
        writing = rng.choice([0, 1, 8, 32])
        budget = timer.token_budget(writing, len(waiting))
        shares = split_budget(list(waiting.items()), budget)
        assert not waiting or sum(shares.values()) == min(budget, sum(waiting.values())) > 0
        for who, share in shares.items():
            waiting[who] -= share
            if not waiting[who]:
                longest = max(longest, step - begun[who])
                total += 1
                del waiting[who]
        prompt = sum(shares.values())
        slow = rng.choice([1.0, 1.0, 3.0])
        timer.record_step(slow * (0.010 + 0.0001 * writing + 0.0002 * prompt), writing, prompt)
    assert total > 50 and number - total < 15
    assert longest < 2000


def test_a_step_with_prompts_is_not_much_longer_than_one_without() -> None:
    timer = StepTimer()
    for _ in range(50):
        timer.record_step(0.020, 4, 0)
        budget = timer.token_budget(4)
        timer.record_step(0.020 + 0.0001 * budget, 4, budget)
    assert 0.020 + 0.0001 * timer.token_budget(4) <= STRETCH * 0.020 * 1.01


def test_where_prompts_outnumber_replies_a_step_is_longer_but_bounded() -> None:
    timer = StepTimer()
    for _ in range(50):
        timer.record_step(0.020, 4, 0)
        timer.record_step(0.020 + 0.0001 * 100, 4, 100)
    assert timer.token_budget(4, 4) == timer.token_budget(4, 1) < timer.token_budget(4, 8) < timer.token_budget(4, 1000)
    assert 0.020 + 0.0001 * timer.token_budget(4, 1000) <= MOST_STRETCH * 0.020 * 1.01


def test_where_there_is_not_a_token_for_each_short_prompts_do_not_wait_for_long_ones() -> None:
    """Nor do long ones wait for ever: the oldest always goes on."""
    waiting = [*((number, 100_000) for number in range(20)), (20, 3), (21, 2)]
    assert split_budget(waiting, 4) == {0: 1, 21: 1, 20: 1, 1: 1}
    assert split_budget(waiting, 1) == {0: 1} and split_budget(waiting, 0) == {}
