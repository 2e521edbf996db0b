"""What goes wrong in the engine ends the request that it concerns, and no other; no request waits for ever."""

from __future__ import annotations

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

from keye import Keye, KeyeError
from keye.chat.messages import Message
from keye.engine.request import Finished, Generating, Running
from keye.engine.step import Slice, run_slices
from keye.engine.vision import VisionJob
from keye.errors import KeyeWarning
from keye.media import processor
from keye.media.frame_stream import FileReader
from keye.media.processor import Processor
from keye.models.keye import KeyeModel
from tests.support.engine import (
    TEXT,
    Inbox,
    about,
    add,
    clip,
    conversation,
    failure,
    generate_alone,
    greedy,
    is_clean,
    run,
    run_all,
    step,
    tokens_of,
)

# Media


def test_a_decode_worker_killed_in_the_middle_fails_its_request_alone(
    model: Keye, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledReader(FileReader):
        """Its decoder is ended from outside after the first frame."""

        def __init__(
            self, source: Any, limits: Any, frames: Callable[[Any], Iterator[Any]], *args: Any, **kw: Any
        ) -> None:
            def read(video: Any) -> Iterator[Any]:
                for number, frame in enumerate(frames(video)):
                    if number == 1:
                        os.kill(video.worker.process.pid, signal.SIGKILL)  # the process is known to its reader alone
                    yield frame

            super().__init__(source, limits, read, *args, **kw)

    bad_request, good_request = greedy(model, about(video)), greedy(model, TEXT)
    monkeypatch.setattr(processor, "FileReader", KilledReader)
    bad, good = add(model, bad_request), add(model, good_request)
    run(model)
    assert "the video decoder of short.mp4 was ended from outside" in failure(bad)
    assert tokens_of(good) == generate_alone(model, TEXT)
    monkeypatch.undo()
    assert model.ask(video, "what is red?", max_tokens=2).usage.media_tokens == 8 * 16
    assert is_clean(model)


@pytest.mark.parametrize("where", ["frames", "open", "lay out"])
def test_a_defect_in_media_fails_its_request(
    model: Keye, video: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A defect is no `KeyeError`; the engine lives on all the same."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the video decoder failed with code 1")

    if where == "frames":
        monkeypatch.setattr(VisionJob, "step", fail)
    elif where == "open":
        monkeypatch.setattr(FileReader, "__init__", fail)
    else:
        monkeypatch.setattr(Processor, "video_stream", fail)
    bad, good = add(model, greedy(model, about(video))), add(model, greedy(model, TEXT))
    run(model)
    assert "failed with code 1" in failure(bad)
    assert tokens_of(good) == generate_alone(model, TEXT)
    assert is_clean(model)


def test_a_request_that_fails_leaves_the_others_alone(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Inbox(), Inbox()
    model.core.add(greedy(model, conversation(3), 4), good)
    frames = Processor.frames

    def broken(self: Processor, *args: Any) -> Any:
        if threading.current_thread().name.startswith("keye-media"):
            raise KeyeError("the decode worker died; try the file again")
        return frames(self, *args)

    monkeypatch.setattr(Processor, "frames", broken)
    model.core.add(greedy(model, conversation(1), 4), bad)
    run(model)
    assert isinstance(good.events[-1], Finished)
    assert "decode worker died" in str(bad.events[-1].error)  # type: ignore[union-attr]


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


# Computation


def test_a_device_that_fails_ends_what_was_on_it(model: Keye) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory on the device")

    run_slices, model.core.run_slices = model.core.run_slices, fail
    with pytest.raises(RuntimeError, match="out of memory on the device"):
        model.chat(conversation(3), max_tokens=2)
    model.core.run_slices = run_slices
    assert model.chat(conversation(3), max_tokens=2).usage.completion_tokens > 0


def test_nan_fails_only_its_request(model: Keye) -> None:

    good, bad = Inbox(), Inbox()
    model.core.add(greedy(model, conversation(3), 4), good)
    spoiled = model.core.add(greedy(model, conversation(6), 4), bad)

    def poisoned(network: KeyeModel, slices: Any) -> Any:
        mine = spoiled.state.caches if isinstance(spoiled.state, Running) else []
        return [
            torch.full_like(logits, torch.nan) if logits is not None and item.cache in mine else logits
            for item, logits in zip(slices, run_slices(network, slices), strict=True)
        ]

    model.core.run_slices = poisoned
    run(model)
    assert isinstance(good.events[-1], Finished)
    assert "computes NaN" in str(bad.events[-1].error)  # type: ignore[union-attr]


def test_invalid_probabilities_fail_their_request_alone(model: Keye) -> None:
    assert tokens_of(run_all(model, greedy(model, TEXT, temperature=1e-320))[0]) == generate_alone(model, TEXT)
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
    assert "probability" in failure(bad) and tokens_of(good) == generate_alone(model, TEXT)


# Ends


def test_requests_dropped_at_any_stage_leave_nothing(model: Keye) -> None:
    rng, open_tasks = random.Random(0), list[Any]()
    for number in range(1000):
        messages = conversation(1 + number % 2) if number % 50 == 0 else [Message("user", (f"q {number % 7}",))]
        open_tasks.append(model.core.add(greedy(model, messages, 6), Inbox()))
        for _ in range(rng.randint(0, 1)):
            model.core.step()
        if rng.random() < 0.9:
            model.core.abort(open_tasks.pop(rng.randrange(len(open_tasks))))
    for task in open_tasks:
        model.core.abort(task)
    model.core.step()
    assert model.core.is_idle()
    model.clear_caches()
    assert model.runtime.ledger.used() == 0 and model.runtime.ledger.accounts() == {}


def test_closing_a_stream_ends_its_request(model: Keye) -> None:
    stream = model.stream(conversation(1), max_tokens=50, ignore_eos=True)
    next(stream)
    assert not model.core.is_idle()
    stream.close()
    assert model.core.is_idle()


def test_a_stream_that_is_dropped_leaves_nothing(model: Keye) -> None:
    stream = model.stream_ask(clip(1), "what?", max_tokens=50, ignore_eos=True)
    next(stream)
    assert not model.core.is_idle()
    del stream
    assert model.core.is_idle() and is_clean(model)


def test_an_abort_during_the_last_step_is_cleaned_up(model: Keye) -> None:
    """An abort during the step of another thread ends nothing itself, and no step may follow."""
    task = model.core.add(greedy(model, about(clip(1)), 50), Inbox())
    while not isinstance(task.state, Generating):
        step(model)

    def abort_meanwhile(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        other = threading.Thread(target=model.core.abort, args=(task,))
        other.start()
        other.join()
        return run_slices(network, slices)

    model.core.run_slices = abort_meanwhile
    model.core.step()
    assert model.core.is_idle() and task.has_ended
    assert is_clean(model)


def test_a_request_out_of_time_says_so(model: Keye) -> None:
    from dataclasses import replace

    request = replace(greedy(model, conversation(3), 500), seconds=0.0)
    inbox = Inbox()
    model.core.add(request, inbox)
    run(model)
    assert "took longer than 0 s" in str(inbox.events[-1].error)  # type: ignore[union-attr]


def test_a_request_names_a_mode_that_exists(model: Keye) -> None:
    with pytest.raises(KeyeError, match="choose sparse or dense"):
        replace(greedy(model, TEXT), attention="spares")  # type: ignore[arg-type]


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
