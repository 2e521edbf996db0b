"""Samples are laid out as inference lays out the same conversation, and learn their replies."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.chat.messages import Medium, Message, ToolCall
from keye.data.samples import Place, Sample
from keye.errors import KeyeError
from keye.train.layout import Layout, LengthError
from keye.train.packing import load, pack
from keye.train.tree import IGNORE
from keye.train.tree import Path as TreePath
from tests.support.clips import write_clip
from tests.support.layouts import moving_frames, nano_layout, official_layout, sample, texts

Shared = Callable[[str], Path]
RELEASES = ("preview", "1.5", "2.0")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds at 30 frames a second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4", frames=90)


@pytest.fixture
def media(video: Path, tmp_path: Path) -> dict[str, tuple[Medium, ...]]:
    picture = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    listed = tuple(Image.fromarray(np.roll(picture, shift)) for shift in range(5))
    return {
        "image": (Medium("image", str(tmp_path / "a.png"), {"max_pixels": 12544}),),
        "video": (Medium("video", str(video), {"fps": 2.0}),),
        "part": (Medium("video", str(video), {"video_start": 1.0, "video_end": 2.5, "max_frames": 3}),),
        "small": (Medium("video", str(video), {"nframes": 4, "min_pixels": 3136, "max_pixels": 6272}),),
        "frames": (Medium("video", listed, {"timestamps": (0.0, 0.4, 0.8, 1.9, 2.0)}),),
        "several": (
            Medium("video", str(video), {"nframes": 4}), Medium("image", str(tmp_path / "a.png")),
            Medium("video", moving_frames(1, 7)), Medium("video", str(video), {"fps": 1.0}),
        ),
    }  # fmt: skip


def learnt_text(layout: Layout, path: TreePath) -> str:
    return texts(layout, path.labels[path.labels != IGNORE])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", ["image", "video", "part", "small", "frames", "several"])
def test_a_sample_is_its_prompt_and_its_reply(
    release: str, kind: str, media: dict[str, tuple[Medium, ...]], shared: Shared
) -> None:
    layout = official_layout(release, shared("checkpoints"))
    item = sample((*media[kind], "What happens at 1.5 seconds?"), "A man opens a door.")
    (path,) = layout.lay_out(item).paths
    inference = layout.builder.lay_out(layout.builder.render(item.messages[:1], template=layout.template))
    n = inference.length
    assert path.token_ids[:n].tolist() == inference.token_ids.tolist()
    assert (path.position_ids[:, :n] == inference.position_ids.numpy()).all()
    after = np.arange(len(path.token_ids) - n) + inference.next_position
    assert (path.position_ids[:, n:] == after).all()
    assert texts(layout, path.token_ids[n:]) == "A man opens a door.<|im_end|>"
    assert (path.labels[: n - 1] == IGNORE).all() and learnt_text(layout, path) == "A man opens a door.<|im_end|>"
    packed = load(pack([layout.lay_out(item)], 100_000)[0])
    assert packed.pixels is not None and len(packed.media) == len(media[kind])
    assert (packed.grids == np.concatenate([item.grid_thw for item in inference.media])).all()
    assert (packed.pixels == np.concatenate([item.vision.pixel_values for item in inference.media])).all()
    assert (packed.is_visual[:n] == inference.is_visual.numpy()).all() and not packed.is_visual[n:].any()


@pytest.mark.parametrize("release", [*RELEASES, "text", "nano"])
def test_turns_without_reasoning_are_one_line(release: str, shared: Shared) -> None:
    layout = nano_layout() if release == "nano" else official_layout(release, shared("checkpoints"))
    item = sample("Hi!", "Hello.", "And now?", "Bye.", learn=(False, True, False, True))
    (path,) = layout.lay_out(item).paths
    assert learnt_text(layout, path) == "Hello.<|im_end|>Bye.<|im_end|>"
    for count in (1, 3):  # each prompt of inference is a beginning of the sample
        prompt = layout.builder.lay_out(layout.builder.render(item.messages[:count], template=layout.template))
        assert path.token_ids[: prompt.length].tolist() == prompt.token_ids.tolist()
    only_last = sample("Hi!", "Hello.", "And now?", "Bye.", learn=(False, False, False, True))
    assert learnt_text(layout, layout.lay_out(only_last).paths[0]) == "Bye.<|im_end|>"


def test_reasoning_of_earlier_turns_is_learnt_before_it_is_dropped(shared: Shared) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    think = "<think>\nTwo doors.\n</think>\n\nTwo."
    item = sample("How many?", think, "Sure?", "<think>\nYes.\n</think>\n\nYes.", mode="think")
    first, second = layout.lay_out(item).paths
    assert learnt_text(layout, first) == "Two doors.\n</think>\n\nTwo.<|im_end|>"
    assert learnt_text(layout, second) == "Yes.\n</think>\n\nYes.<|im_end|>"
    assert "Two doors" not in texts(layout, second.token_ids)
    for path, count in ((first, 1), (second, 3)):
        segments = layout.builder.render(item.messages[:count], template=layout.template, thinking=True)
        prompt = layout.builder.lay_out(segments)
        assert path.token_ids[: prompt.length].tolist() == prompt.token_ids.tolist()
        assert path.first_label == prompt.length - 1
    assert layout.lay_out(item).length < len(first.token_ids) + len(second.token_ids)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("mode", ["think", "no_think", "auto", None])
def test_modes_ask_as_inference_asks(release: str, mode: str | None, shared: Shared) -> None:
    layout = official_layout(release, shared("checkpoints"))
    reply = "<think>\nIt is red.\n</think>\n\nRed." if mode == "think" else "Red."
    item = sample("Which color?", reply, mode=mode)
    (path,) = layout.lay_out(item).paths
    thinking = {"think": True, "no_think": False}.get(mode or "")
    segments = layout.builder.render(item.messages[:1], template=layout.template, thinking=thinking)
    prompt = layout.builder.lay_out(segments).token_ids.tolist()
    assert path.token_ids[: len(prompt)].tolist() == prompt
    text = texts(layout, path.token_ids)
    assert text.endswith(f"{reply}<|im_end|>") and learnt_text(layout, path).endswith("ed.<|im_end|>")


def test_the_layout_of_a_folder_follows_its_own_template(shared: Shared) -> None:
    layout = Layout.of_folder(shared("checkpoints/keye-vl-8b-preview"))
    item = sample("Hi!", "Hello.", "And now?", "<think>\nHm.\n</think>\n\nBye.")
    (path,) = layout.lay_out(item).paths
    assert texts(layout, path.token_ids).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert learnt_text(layout, path) == "Hello.<|im_end|><think>\nHm.\n</think>\n\nBye.<|im_end|>"
    own = Layout.of_folder(shared("checkpoints/keye-vl-8b-preview"), template="keye")
    assert own.lay_out(item).paths[0].token_ids.tolist() == path.token_ids.tolist()


def test_tool_turns_keep_their_reasoning(shared: Shared) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    call = Message("assistant", ("<think>\nLook closer.\n</think>\n\n",), (ToolCall("zoom", {"at": 2}),))
    picture = Medium("image", Image.new("RGB", (56, 56)))
    messages = (
        Message("user", ("Which letter?",)), call, Message("tool", (picture,)), Message("assistant", ("A",))
    )  # fmt: skip
    tools = ({"type": "function", "function": {"name": "zoom"}},)
    item = Sample(messages, (False, True, False, True), Place("a", 1), tools=tools)
    (path,) = layout.lay_out(item).paths
    learnt = learnt_text(layout, path)
    assert (
        learnt.startswith("<think>\nLook closer.") and '"zoom"' in learnt and learnt.endswith("<|im_end|>A<|im_end|>")
    )
    assert len(path.media) == 1


def test_a_plain_text_is_learnt_as_it_stands(shared: Shared, media: dict[str, tuple[Medium, ...]]) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    parts = (*media["image"], "A door. ", *media["video"], "It <|im_end|> opens.")
    item = Sample((Message("user", parts),), (True,), Place("a", 1), plain=True)
    (path,) = layout.lay_out(item).paths
    assert learnt_text(layout, path) == "A door. It <|im_end|> opens.<|endoftext|>"
    assert layout.builder.tokenizer.token_id("<|im_end|>") not in path.token_ids
    assert texts(layout, path.token_ids).startswith("<|vision_start|><|image_pad|>")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learn": (True, False)}, "message 1 is learnt"),
        ({"learn": (False, False)}, "nothing of it is learnt"),
        ({"mode": "think"}, "starts with <think>"),
    ],
)
def test_samples_that_cannot_be_learnt_name_their_place(fields: Any, words: str, shared: Shared) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    with pytest.raises(KeyeError, match=rf"data\.jsonl:7: .*{words}"):
        layout.lay_out(sample("Hi", "Hello.", line=7, **fields))


def test_a_missing_file_is_named_with_the_place(shared: Shared) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    with pytest.raises(KeyeError, match=r"data\.jsonl:3: .*gone\.mp4"):
        layout.lay_out(sample((Medium("video", "/gone.mp4"), "Hi"), "Hello.", line=3))


def test_options_that_are_not_honoured_are_noted(shared: Shared, media: dict[str, tuple[Medium, ...]]) -> None:
    layout = official_layout("2.0", shared("checkpoints"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laid_out = layout.lay_out(sample((*media["small"], "Hi"), "Hello."))
    (note,) = laid_out.notes
    assert note.startswith("max_pixels=6272 cannot be met for a.mp4")


def test_media_are_never_cut(shared: Shared, video: Path) -> None:
    layout = official_layout("2.0", shared("checkpoints"), max_tokens=60)
    with pytest.raises(LengthError, match=r"data\.jsonl:2: the sample takes at least \d+ tokens, \d+ of them visual, "
                       "but max_length is 60"):  # fmt: skip
        layout.lay_out(sample((Medium("video", str(video)), "Hi"), "Hello.", line=2))
    assert layout.lay_out(sample("Hi", "Hello.")).length < 60
