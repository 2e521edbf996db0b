"""Visual tokens encoded piece by piece: the same as all at once, however frames arrive; what is kept, what is freed."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import keye
from keye import Frames
from keye.cache.ledger import Ledger, OutOfMemory
from keye.cache.vision import VisionCache
from keye.chat.messages import Message
from keye.data.frameforge import make_clip, write_mp4
from keye.engine import vision
from keye.engine.engine import Engine
from keye.engine.media import as_medium
from keye.engine.prompt import Prompt, PromptBuilder
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.engine.vision import VisionJob
from keye.errors import MediaError
from keye.media.pixels.patches import HeldPatches, VisionInput
from keye.media.processor import Processor
from keye.media.video import VideoReader
from tests.support.tiny import tiny_folder, tiny_model


@pytest.fixture(scope="module")
def tiny() -> Runtime:
    return tiny_model()


@pytest.fixture(scope="module")
def builder(tiny: Runtime) -> PromptBuilder:
    return PromptBuilder(tiny.model.config, tiny.tokenizer, Processor(tiny.processor.config))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of 112 x 112 in a group."""
    monkeypatch.setattr(vision, "GROUP_PATCHES", 192)


def prompt_of(builder: PromptBuilder, *media: object) -> Prompt:
    """A prompt whose videos are not decoded yet."""
    message = Message("user", (*map(as_medium, media), "what?"))
    return builder.lay_out(builder.render([message]), stream=True)


def encode_at_once(tiny: Runtime, prompt: Prompt) -> Tensor:
    """All visual tokens of a prompt at once."""
    patches = prompt.vision()
    assert patches is not None
    with torch.inference_mode():
        return tiny.model.encode_vision(*patches)


def run(job: VisionJob, patches: int = 64) -> Tensor:
    while not job.done:
        job.step(patches)
    return job.tokens(0, job.total).clone()


@dataclass(frozen=True)
class Trickle:
    """Patches of which `arrived[0]` rows are there."""

    vision: VisionInput
    arrived: list[int]

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        return self.vision.grid_thw

    def open(self) -> Any:
        return _TrickleReader(self.vision, self.arrived)


class _TrickleReader(HeldPatches):
    def __init__(self, patches: VisionInput, arrived: list[int]) -> None:
        super().__init__(patches)
        self._arrived = arrived

    def has(self, rows: int) -> bool:
        return self._row + rows <= self._arrived[0]


@pytest.mark.usefixtures("small_groups")
def test_steps_and_arrivals_change_no_bit(tiny: Runtime, builder: PromptBuilder) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 112, 112, 3), dtype=np.uint8)
    prompt = prompt_of(builder, Frames(frames, list(range(11))), Image.new("RGB", (84, 56), "red"))
    expected = run(VisionJob(tiny.model, prompt.media), 10**9)
    assert (expected - encode_at_once(tiny, prompt)).abs().max() <= 1e-6
    rng = random.Random(0)
    for _ in range(5):
        arrived = [0]
        trickle = Trickle(prompt.media[0].vision, arrived)
        slow = replace(prompt, media=(replace(prompt.media[0], pixels=trickle), prompt.media[1]))
        job, patches = VisionJob(tiny.model, slow.media), rng.choice([1, 64, 200, 500])
        while not job.done:
            before = job.ready
            if job.waiting:
                assert job.step(patches) == 0 and job.ready == before
                arrived[0] += rng.randint(0, 4)
            else:
                assert job.step(patches) > 0 and job.ready > before
        assert torch.equal(job.tokens(0, job.total), expected)
        job.close()


@pytest.mark.usefixtures("small_groups")
def test_a_step_keeps_to_its_patches(tiny: Runtime, builder: PromptBuilder) -> None:
    job = VisionJob(tiny.model, prompt_of(builder, Frames(np.zeros((8, 112, 112, 3), np.uint8))).media)
    assert [job.step(400) for _ in range(3)] == [384, 128, 0]  # groups of three, three and two frames


@pytest.mark.usefixtures("small_groups")
def test_a_video_file_is_encoded_while_it_is_decoded(tiny: Runtime, builder: PromptBuilder, video: Path) -> None:
    prompt, ledger = prompt_of(builder, video, video), Ledger()
    job = VisionJob(tiny.model, prompt.media, cache=VisionCache(0, ledger))
    assert job.total == 2 * 8 * 16
    assert (run(job) - encode_at_once(tiny, prompt)).abs().max() <= 1e-6
    assert ledger.used("vision") == job.total * 64 * 4  # float32
    job.close()
    job.close()
    assert ledger.used() == 0


@pytest.mark.usefixtures("small_groups")
def test_used_tokens_are_freed(tiny: Runtime, builder: PromptBuilder) -> None:
    ledger = Ledger()
    job = VisionJob(
        tiny.model, prompt_of(builder, Frames(np.zeros((9, 112, 112, 3), np.uint8))).media, cache=VisionCache(0, ledger)
    )
    run(job)
    reserved, last = ledger.used(), job.tokens(100, 144).clone()
    job.forget(100)  # the first two of three groups
    assert ledger.used() == reserved / 3 and torch.equal(job.tokens(100, 144), last)
    with pytest.raises(AssertionError):
        job.tokens(0, 1)
    job.close()
    assert ledger.used() == 0


def test_closing_at_any_moment_leaves_nothing(tiny: Runtime, builder: PromptBuilder, video: Path) -> None:
    ledger = Ledger()
    cache = VisionCache(ledger=ledger)
    prompt = prompt_of(builder, video, Image.new("RGB", (56, 56)))
    for steps in range(4):
        job = VisionJob(tiny.model, prompt.media, cache=cache if steps % 2 else VisionCache(0, ledger))
        for _ in range(steps):
            while job.waiting:
                os.sched_yield()
            job.step(1)
        job.close()
        assert ledger.used("vision") == 0
    cache.clear()
    assert ledger.used() == 0


def test_a_broken_file_is_an_error_of_the_step(
    tiny: Runtime, builder: PromptBuilder, video: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(video.read_bytes())
    prompt = prompt_of(builder, copy)
    copy.write_bytes(video.read_bytes()[:3000])
    job = VisionJob(tiny.model, prompt.media)
    with pytest.raises(MediaError, match="copy.mp4"):
        run(job)
    job.close()


def test_media_that_are_stored_already_are_left_out(tiny: Runtime, builder: PromptBuilder, video: Path) -> None:
    prompt = prompt_of(builder, Image.new("RGB", (56, 56), "red"), video)
    expected = run(VisionJob(tiny.model, prompt.media))
    job = VisionJob(tiny.model, prompt.media, first=4)
    while not job.done:
        job.step(1 << 20)
    assert torch.equal(job.tokens(4, job.total), expected[4:])
    assert VisionJob(tiny.model, prompt.media, first=job.total).done


# The cache


def test_a_second_question_decodes_and_encodes_nothing(
    tiny: Runtime, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = keye.load(tiny_folder(tmp_path / "model"))
    first = model.ask([video, Image.new("RGB", (56, 56))], "what?", max_tokens=4)
    monkeypatch.setattr(VideoReader, "__init__", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr(model.model, "encode_vision", lambda *_: pytest.fail("frames were encoded"))
    again = model.ask([video, Image.new("RGB", (56, 56))], "what?", max_tokens=4)
    assert again.text == first.text and model.runtime.vision_cache.nbytes() == (8 * 16 + 4) * 64 * 2


def test_the_cache_keeps_to_its_budget_and_gives_up_the_oldest() -> None:
    ledger, rows = Ledger(), torch.zeros(10, 16)  # 640 bytes each
    cache = VisionCache(2000, ledger)
    for key in (b"a", b"b", b"c"):
        assert cache.put(key, rows) is rows
        cache.release(key)
    assert cache.acquire(b"a") is not None  # now the latest, and in use
    assert cache.put(b"d", rows) is not None
    assert cache.nbytes() == ledger.used("vision-cache") == 3 * 640
    assert cache.acquire(b"b") is None and cache.acquire(b"c") is not None
    assert cache.put(b"e", rows) is None  # all that is kept is in use
    assert cache.put(b"f", torch.zeros(100, 16)) is None
    cache.release(b"a")
    assert cache.evict() and cache.acquire(b"a") is None


def test_the_cache_makes_room_for_others(tiny: Runtime, builder: PromptBuilder) -> None:
    size = 128 * 64 * 4
    ledger = Ledger(size + size // 2)
    cache = VisionCache(size, ledger)
    old, new = (prompt_of(builder, Frames(np.full((8, 112, 112, 3), value, np.uint8))) for value in (1, 2))
    for prompt in (old, new):
        job = VisionJob(tiny.model, prompt.media, cache=cache)
        run(job)
        job.close()
    assert new.media[0].key is not None and old.media[0].key is not None
    assert cache.acquire(old.media[0].key) is None and cache.acquire(new.media[0].key) is not None
    with pytest.raises(OutOfMemory):
        run(VisionJob(tiny.model, old.media, cache=cache))


def test_a_stream_gives_the_same_probabilities(tiny: Runtime, builder: PromptBuilder, video: Path) -> None:
    streamed = prompt_of(builder, video)
    decoded = builder.build([Message("user", (as_medium(video), "what?"))])
    engine, params = Engine(tiny), SamplingParams(max_tokens=4)
    results = [engine.generate([prompt], params)[0].completions[0] for prompt in (decoded, streamed, streamed)]
    assert all(torch.equal(result.raw_logprobs, results[0].raw_logprobs) for result in results)
    assert tiny.vision_cache.nbytes() > 0
