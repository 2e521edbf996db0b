"""vLLM's OpenAI server with the plug-in, with questions of the official client, answers as `keye serve` does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks import vllm_nano
from keye.hub import asset

#: A few questions of each kind; `python -m benchmarks.vllm_nano` asks more.
QUESTIONS = 24
CLIP = vllm_nano.data_url(asset("demo.mp4"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers") / "log"


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, str, dict[str, Any]]]:
    """Videos, questions, and how frames are sampled."""
    clips = vllm_nano.questions(QUESTIONS)
    return [(video, item.text, vllm_nano.sampling(clip)) for _, clip, video, own in clips for item in own]


@pytest.fixture(scope="module")
def expected(questions: Any, log: Path) -> list[vllm_nano.Reply]:
    """What `keye serve` answers."""
    with vllm_nano.running(vllm_nano.keye_command(), log) as client:
        return [vllm_nano.ask(client, video, question, **options) for video, question, options in questions]


@pytest.fixture(scope="module")
def client(expected: Any, log: Path) -> Iterator[openai.OpenAI]:
    trust = ["--trust-request-mm-kwargs", "--trust-request-chat-template"]
    with vllm_nano.running(vllm_nano.vllm_command(vllm_nano.PORT, "--enforce-eager", *trust), log) as client:
        yield client


@pytest.mark.slow
def test_frameforge(client: openai.OpenAI, questions: Any, expected: list[vllm_nano.Reply]) -> None:
    replies = [vllm_nano.ask(client, video, question, **options) for video, question, options in questions]
    gaps = [vllm_nano.gap(*pair) for pair in zip(replies, expected, strict=True) if pair[0].text != pair[1].text]
    assert all(gap <= vllm_nano.TIE for gap in gaps), gaps
    assert len(gaps) <= QUESTIONS // 10


@pytest.mark.slow
def test_mistakes_are_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown key 'fsp'"):
        vllm_nano.ask(client, CLIP, "when?", fsp=1)
    with pytest.raises(openai.BadRequestError, match="media_io_kwargs has fps"):
        client.chat.completions.create(
            model="nano", messages=_about(CLIP), extra_body={"media_io_kwargs": {"video": {"fps": 1}}}
        )
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs.thinking is not known"):
        client.chat.completions.create(
            model="nano", messages=_about(CLIP), extra_body={"chat_template_kwargs": {"thinking": True}}
        )
    with pytest.raises(openai.BadRequestError, match="no video that keye reads|<bytes>"):
        vllm_nano.ask(client, "data:video/mp4;base64,bm9uc2Vuc2U=", "when?")
    assert "[[" in vllm_nano.ask(client, CLIP, "when is the cyan triangle visible?").text


@pytest.mark.slow
def test_a_template_may_be_asked_for(client: openai.OpenAI) -> None:
    """vLLM's way of writing prompts, with the placeholder of the plug-in in it."""
    place = "<|vision_start|><|video_pad|><|vision_end|>"
    part = "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + place + "{% endif %}"
    parts = "{% for part in message['content'] %}" + part + "{% endfor %}"
    turn = "<|im_start|>{{ message['role'] }}\n" + parts + "<|im_end|>\n"
    template = "{% for message in messages %}" + turn + "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    settings: Any = {"model": "nano", "messages": _about(CLIP), "temperature": 0, "max_tokens": 48}
    own = client.chat.completions.create(**settings)
    theirs = client.chat.completions.create(**settings, extra_body={"chat_template": template})
    assert theirs.choices[0].message.content == own.choices[0].message.content
    assert theirs.usage is not None and own.usage is not None
    assert theirs.usage.prompt_tokens == own.usage.prompt_tokens


@pytest.mark.slow
def test_behind_the_server_of_keye(tmp_path: Path) -> None:
    """`keye serve --engine vllm`: an upload, a question, a stream; what needs keye's own engine is 501."""
    limit = ("--engine-option=--max-model-len=8192", "--engine-option=--enforce-eager")
    port = vllm_nano.PORT + 1  # on the other one vLLM may still answer by itself
    command = [sys.executable, "-m", "keye", "serve", "--port", str(port), "--engine", "vllm", *limit]
    with vllm_nano.running(command, tmp_path / "log", port) as client:
        upload = client.files.create(file=asset("demo.mp4"), purpose="user_data")
        about: Any = [
            {
                "role": "user",
                "content": [
                    {"type": "file", "file": {"file_id": upload.id}},
                    {"type": "text", "text": "when is the cyan triangle visible?"},
                ],
            }
        ]
        settings: Any = {"model": "nano", "messages": about, "temperature": 0, "max_tokens": 48}
        text = client.chat.completions.create(**settings).choices[0].message.content
        assert text is not None and text.startswith("[[")
        pieces = client.chat.completions.create(**settings, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
        with pytest.raises(openai.InternalServerError, match="keye's own engine"):
            client.post("/video/find", body={"video": {"file_id": upload.id}, "event": "x"}, cast_to=object)


def _about(video: str) -> Any:
    question = {"type": "text", "text": "when is the cyan triangle visible?"}
    return [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": video}}, question]}]
