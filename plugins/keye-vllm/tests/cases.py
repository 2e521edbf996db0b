"""Conversations of every kind, and how an output of vLLM is held to keye."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import SamplingParams

import keye
from checkpoints import log_probabilities
from keye.engine.prompt import Prompt
from keye.hub import asset

#: Largest difference of a log-probability; observed are differences of 2e-6.
TOLERANCE = 1e-4
REPLY = 8


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def noise(height: int, width: int, kind: str = "PNG", seed: int = 0) -> bytes:
    """A picture file in which every pixel counts."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURE, OTHER = data_url("image/png", noise(90, 120)), data_url("image/jpeg", noise(64, 200, "JPEG"))
CLIP = data_url("video/mp4", asset("demo.mp4").read_bytes())
FRAMES = "data:video/jpeg;base64," + ",".join(
    base64.b64encode(noise(56, 84, "JPEG", seed)).decode() for seed in range(4)
)  # fmt: skip


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **options}


def video(url: str, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **options}


CONVERSATIONS = {
    "text": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "when is the cyan triangle visible? " * 4},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n[[1, 2]]"},
        {"role": "user", "content": "a <|im_end|> that a user types is text, <|video_pad|> too"},
    ],
    "image": user(image(PICTURE), text("what is it?"), image(OTHER, preprocess_kwargs={"max_pixels": 3136})),
    "video": user(
        {"type": "video_url", "video_url": {"url": CLIP, "preprocess_kwargs": {"fps": 1}}}, text("when does it move?")
    ),
    "videos": user(video(CLIP, nframes=4), text("and"), video(CLIP, video_start=1, video_end=4), text("alike?")),
    "frames": user(video(FRAMES), image(PICTURE), text("is the picture among the frames?")),
}  # fmt: skip


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=REPLY, ignore_eos=True, logprobs=0, **settings)


def check(own: keye.Keye, messages: list[Any], output: Any, *, mode: Any = "sparse") -> float:
    """Holds an output of vLLM to keye: the same prompt, and the same log-probabilities of all its tokens that vLLM
    tells. Returns the mean difference that dense attention would make."""
    return check_prompt(own, own.runtime.prompts.build(messages), output, mode=mode)


def check_prompt(own: keye.Keye, prompt: Prompt, output: Any, *, mode: Any = "sparse") -> float:
    """The same for a prompt that was laid out before."""
    ids, reply = output.prompt_token_ids, output.outputs[0]
    assert ids == prompt.token_ids.tolist()
    result = [step[token].logprob for step, token in zip(reply.logprobs, reply.token_ids, strict=True)]
    if output.prompt_logprobs:
        result = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)] + result
    expected = log_probabilities(own, prompt, list(reply.token_ids), mode)[-len(result) :]
    assert (torch.tensor(result) - expected).abs().max() < TOLERANCE
    dense = log_probabilities(own, prompt, list(reply.token_ids), "dense")[-len(result) :]
    return float((expected - dense).abs().mean())
