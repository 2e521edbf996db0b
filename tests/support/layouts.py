"""What lays out samples for each release, with the official tokenizer and narrow configurations: no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from keye.chat.messages import Medium, Message
from keye.chat.template import template_of
from keye.chat.tokenizer import Tokenizer
from keye.config import ProcessorConfig, load_processor_config, model_config_from_dict
from keye.data.samples import Place, Sample
from keye.engine.media import Frames
from keye.engine.prompt import PromptBuilder
from keye.media.processor import Processor
from keye.train.layout import Layout
from tests.support.tiny import NANO, tiny_config

RELEASES = {"preview": "keye-vl-8b-preview", "1.5": "keye-vl-1.5-8b", "2.0": "keye-vl-2.0-30b-a3b"}


_read_tokenizer = lru_cache(Tokenizer.from_file)


def official_layout(release: str, checkpoints: Path, **options: Any) -> Layout:
    """The layout of a release's own configuration and templates; "text" has no vision part."""
    raw = json.loads((checkpoints / RELEASES.get(release, RELEASES["1.5"]) / "config.json").read_text())
    config = model_config_from_dict(raw)
    if release == "text":
        config = replace(config, has_vision=False)
    tokenizer = _read_tokenizer(checkpoints / RELEASES["preview"])
    processor = Processor(ProcessorConfig.of(config.release))
    return Layout(PromptBuilder(config, tokenizer, processor), template_of(config.release), **options)


def nano_layout(**options: Any) -> Layout:
    """The layout of a tiny model with nano's tokenizer."""
    config = tiny_config()
    builder = PromptBuilder(config, Tokenizer.from_file(NANO), Processor(load_processor_config(NANO)))
    return Layout(builder, template_of(config.release), **options)


def sample(*turns: str | tuple[Medium | str, ...], line: int = 1, **fields: Any) -> Sample:
    """A conversation in which user and assistant take turns, the assistant's learnt."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], turn if isinstance(turn, tuple) else (turn,)) for i, turn in enumerate(turns)]
    learn = tuple(message.role == "assistant" for message in messages)
    return Sample(tuple(messages), fields.pop("learn", learn), Place("data.jsonl", line), **fields)


def moving_frames(seed: int, frames: int, side: int = 84) -> Frames:
    """A video in memory whose frames differ, two a second."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    return Frames(pixels, tuple(i / 2 for i in range(frames)))


def texts(layout: Layout, ids: Sequence[int]) -> str:
    """Decoded, special tokens as well."""
    return layout.builder.tokenizer.decode([int(i) for i in ids], skip_special=False)
