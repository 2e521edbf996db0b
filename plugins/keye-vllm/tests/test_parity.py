"""vLLM with the plug-in computes what keye computes: log-probabilities of prompts and replies in float32.

One engine with experts; it computes prompts in chunks of 64 tokens and keeps their KV blocks.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import LLM

import keye
from cases import (
    CLIP,
    CONVERSATIONS,
    PICTURE,
    TOLERANCE,
    check,
    check_prompt,
    data_url,
    greedy,
    image,
    noise,
    text,
    user,
    video,
)
from checkpoints import TOPK, random_checkpoint
from conftest import StartEngine
from keye.chat.messages import Medium
from keye.chat.template import Segment
from keye.errors import KeyeError
from keye.hub import asset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def own(folder: Path) -> keye.Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def engine(folder: Path, start_engine: StartEngine) -> LLM:
    return start_engine(folder)


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_prompt_and_reply(case: str, engine: LLM, own: keye.Keye) -> None:
    messages = CONVERSATIONS[case]
    (output,) = engine.chat(messages, greedy(prompt_logprobs=0), use_tqdm=False)
    assert len(output.prompt_token_ids) > 2 * TOPK
    assert check(own, messages, output) > 1000 * TOLERANCE, "sparse attention must differ from dense here"


def test_several_at_once_from_kept_pages(engine: LLM, own: keye.Keye) -> None:
    """Prompts that were computed before go on from their KV blocks, side by side with new ones."""
    new = user(text("what is written on the sign? " * 5))
    every = [*CONVERSATIONS.values(), new]
    outputs = engine.chat(every, [greedy()] * len(every), use_tqdm=False)
    for messages, output in zip(every, outputs, strict=True):
        check(own, messages, output)
    for output in outputs[:-1]:  # full blocks but the last token, whose hidden state is needed
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 64 * 64
    assert outputs[-1].num_cached_tokens == 0


def test_options_for_every_medium(engine: LLM, own: keye.Keye) -> None:
    """`mm_processor_kwargs` hold for media without an option of that name."""
    messages = user(video(CLIP), text("and"), video(CLIP, nframes=3))
    (output,) = engine.chat(messages, greedy(), use_tqdm=False, mm_processor_kwargs={"nframes": 5})
    with_all = user(video(CLIP, nframes=5), text("and"), video(CLIP, nframes=3))
    check(own, with_all, output)


TOOL = {
    "type": "function",
    "function": {"name": "cut", "description": "cuts a clip", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "cut", "arguments": '{"where": [1, 2]}'}}


@pytest.mark.parametrize("thinking", [None, True, False])
def test_tools_and_reasoning(thinking: bool | None, engine: LLM, own: keye.Keye) -> None:
    """A conversation with calls of functions becomes the same prompt, and so does the switch of reasoning."""
    messages = [
        {"role": "user", "content": "cut it"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "done, <|im_end|>"},
        {"role": "user", "content": [text("and now? ")]},
    ]
    settings = {} if thinking is None else {"enable_thinking": thinking}
    (output,) = engine.chat(messages, greedy(), use_tqdm=False, tools=[TOOL], chat_template_kwargs=settings)
    prompt = own.runtime.prompts.build(messages, tools=[TOOL], thinking=thinking)
    assert output.prompt_token_ids == prompt.token_ids.tolist()


def test_media_in_memory(engine: LLM, own: keye.Keye) -> None:
    """`LLM.generate` takes pictures, frames with their times, paths and bytes."""
    frames = np.random.default_rng(3).integers(0, 255, (4, 56, 84, 3), dtype=np.uint8)
    path = asset("demo.mp4")
    value = {
        "image": [Image.open(io.BytesIO(noise(90, 120)))],
        "video": [(frames, {"fps": 2.0, "frames_indices": [0, 1, 2, 4]}), path],
    }
    prompt = "<|video_pad|>x<|image_pad|><|video_pad|>what?"
    (output,) = engine.generate({"prompt": prompt, "multi_modal_data": value}, greedy(), use_tqdm=False)
    parts = [
        Segment("video", Medium("video", keye.Frames(frames, [0.0, 0.5, 1.0, 2.0]))), Segment("template", "x"),
        Segment("image", Medium("image", value["image"][0])), Segment("video", Medium("video", path)),
        Segment("template", "what?"),
    ]  # fmt: skip
    check_prompt(own, own.runtime.prompts.lay_out(parts), output)


@pytest.mark.parametrize(
    ("messages", "options", "sentence"),
    [
        (
            user(video(CLIP, preprocess_kwargs={"fsp": 1}), text("?")),
            {},
            r"messages\[0\].content\[0\].* unknown key 'fsp'",
        ),
        (user(image(PICTURE, preprocess_kwargs={"fps": 1}), text("?")), {}, "unknown key 'fps'"),
        (user(video(CLIP), text("?")), {"fsp": 1}, "mm_processor_kwargs.fsp is not an option of media"),
        (user(video(CLIP), text("?")), {"videos_in_prompt": 2}, "is counted by the plug-in"),
        (user(video(CLIP), text("?")), {"videos_kwargs": {"size": 1}}, "videos_kwargs.size is not an option of videos"),
        (user(video(CLIP, preprocess_kwargs={"fps": -1}), text("?")), {}, "fps is -1: give a positive number"),
        (user(video(CLIP, min_pixels=784000, max_pixels=784000, nframes=3), text("?")), {}, "the context holds 2048"),
        (user(video(data_url("video/mp4", b"nonsense")), text("?")), {}, "<bytes>"),
    ],
)
def test_bad_input(messages: Any, options: dict[str, Any], sentence: str, engine: LLM, own: keye.Keye) -> None:
    with pytest.raises(KeyeError, match=sentence):
        engine.chat(messages, greedy(), use_tqdm=False, mm_processor_kwargs=options or None)
    text_only = CONVERSATIONS["text"]
    check(own, text_only, engine.chat(text_only, greedy(), use_tqdm=False)[0])  # the engine goes on
