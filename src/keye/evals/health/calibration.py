"""Prompts that show which inputs of a model's matrices count, for quantisation by data (`keye.models.importance`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from keye.api import Keye
from keye.batch.manifest import Item, read_manifest
from keye.chat.messages import Medium, Message
from keye.data import frameforge
from keye.engine.media import Frames, as_medium
from keye.errors import KeyeError
from keye.media.source.fetch import fetch_source, media_kind
from keye.models.importance import observe_squares

#: A conversation as `keye.Keye.chat` takes it.
Prompt = Sequence[Any]
#: Most prompts that are asked, and the tokens of each reply.
MOST_PROMPTS: Final = 256
REPLY_TOKENS: Final = 32
#: What is asked about each medium of a folder.
FOLDER_QUESTION: Final = "Describe what is shown, and when."
FRAMEFORGE: Final = "frameforge"
_SEED: Final = 20_27


def measure_importance(
    model: Keye, prompts: Sequence[Prompt], on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Mean squared inputs of every matrix, float32 by official name, while the model answers the prompts."""
    with observe_squares(model.model) as squares, torch.inference_mode():
        for number, prompt in enumerate(prompts, 1):
            model.chat(prompt, max_tokens=REPLY_TOKENS, temperature=0.0)
            if on_progress is not None:
                on_progress(number, len(prompts))
    return squares.means()


def read_prompts(name: str) -> list[Prompt]:
    """What `keye quantize --data-aware` names: `frameforge` for generated clips, a manifest of `keye batch`, a text
    file with a question a line, or a folder of media. `KeyeError` where that holds no prompt."""
    if name == FRAMEFORGE:
        return frameforge_prompts()
    path, prompts = Path(name).expanduser(), list[Prompt]()
    if path.is_dir():
        media = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        prompts = [_about(file) for file in media[:MOST_PROMPTS] if _is_medium(file)]
    elif path.suffix.lower() in (".jsonl", ".csv"):
        items = read_manifest(path)
        prompts = [item.body["messages"] for item in items[:MOST_PROMPTS] if isinstance(item, Item)]
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise KeyeError(f"{path} is not text: give a question a line, or a manifest of keye batch") from None
        prompts += [[Message("user", (line.strip(),))] for line in lines if line.strip()][:MOST_PROMPTS]
    else:
        raise KeyeError(f"{name} does not exist: give {FRAMEFORGE}, a folder of media, or a file of prompts")
    if not prompts:
        raise KeyeError(f"{name} holds no prompts: give a folder of media, or a file with a question a line")
    return prompts


def frameforge_prompts(clips: int = 64) -> list[Prompt]:
    """Questions about generated clips of the training split: none of them is in an evaluation."""
    rng, prompts = random.Random(_SEED), list[Prompt]()
    for _ in range(clips):
        frames = rng.randint(16, 32)
        clip = frameforge.make_clip(rng.getrandbits(60), frames=frames, objects=4, split="train", size=(112, 112))
        medium = Medium("video", Frames(frameforge.render(clip), clip.timestamps))
        prompts += [[Message("user", (medium, question.text))] for question in frameforge.questions(clip, rng, 2)]
    return prompts


def _about(file: Path) -> Prompt:
    return [Message("user", (as_medium(str(file)), FOLDER_QUESTION))]


def _is_medium(file: Path) -> bool:
    try:
        return media_kind(fetch_source(str(file))) is not None
    except KeyeError:
        return False
