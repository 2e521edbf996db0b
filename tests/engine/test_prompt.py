"""Prompts as token ids: what users, tools and files say never becomes a control token, under any template."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.chat.foreign_template import CheckpointTemplate
from keye.chat.template import CHATML, PREVIEW_CHATML, ChatTemplate
from keye.chat.tokenizer import CONTROL_TOKENS, FRAME_TOKENS, MARKUP_TOKENS, POLYGON_TOKENS, Tokenizer
from keye.config import load_model_config, load_processor_config
from keye.engine.prompt import PromptBuilder
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source
from tests.support.clips import write_clip

NANO = Path(__file__).parents[2] / "configs/nano"
BUILDER = PromptBuilder(load_model_config(NANO), Tokenizer.from_file(NANO), Processor(load_processor_config(NANO)))
EVIL = "".join(CONTROL_TOKENS + MARKUP_TOKENS + FRAME_TOKENS + POLYGON_TOKENS)
THEIRS = CheckpointTemplate(
    "Theirs",
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>",
    "{{ tools | tojson }}{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
)


def conversation(text: str, picture: Path) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": [{"type": "image", "image": str(picture)}, text]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {text: [text]}}]},
        {"role": "tool", "content": text},
        {"role": "user", "content": text},
    ]


def added_tokens(text: str, folder: Path, template: ChatTemplate | CheckpointTemplate, tools: bool) -> Counter[int]:
    picture = folder / f"{text[:200].replace('/', '')}.png"
    Image.new("RGB", (56, 56)).save(picture)
    offered = [{"name": "f", "description": text, "parameters": {"title": text}}] if tools else []
    prompt = BUILDER.build(conversation(text, picture), template=template, tools=offered)
    added = set(BUILDER.tokenizer.added_tokens.values())
    return Counter(index for index in prompt.token_ids.tolist() if index in added)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("template", [CHATML, PREVIEW_CHATML, THEIRS], ids=["chatml", "preview", "theirs"])
def test_only_the_template_writes_tokens(
    template: ChatTemplate | CheckpointTemplate, tools: bool, tmp_path: Path
) -> None:
    harmless, evil = (added_tokens(text, tmp_path, template, tools) for text in ("hello", EVIL))
    assert harmless == evil and harmless[BUILDER.tokenizer.token_id("<|im_end|>")] >= 5


def test_a_video_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=4)
    fetched = []

    def count_fetches(value: Any, *arguments: Any, **options: Any) -> Source:
        if not isinstance(value, Source):
            fetched.append(value)
        return fetch_source(value, *arguments, **options)

    monkeypatch.setattr("keye.media.source.fetch.fetch_source", count_fetches)
    BUILDER.build([{"role": "user", "content": [{"type": "video", "video": str(path)}, "q"]}])
    assert fetched == [str(path)]


def test_neighbouring_texts_are_encoded_as_one() -> None:
    total = BUILDER.build([{"role": "user", "content": "\n\nred circle"}])
    parts = BUILDER.build([{"role": "user", "content": ["\n", "\nred ", "circle"]}])
    official = "<|im_start|>user\n\n\nred circle<|im_end|>\n<|im_start|>assistant\n"
    assert total.token_ids.tolist() == parts.token_ids.tolist() == BUILDER.tokenizer.encode(official, special=True)
