"""Checkpoints of every release, small and random, through the front door: `keye.load` and a question."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import keye
from keye.chat.tokenizer import Tokenizer
from keye.config import load_processor_config, model_config_from_dict
from keye.engine.prompt import PromptBuilder
from keye.errors import KeyeError, KeyeWarning
from keye.media.pixels.patches import VisionInput
from keye.media.processor import MediaItem, Processor, VisualSpan
from keye.models.load import save_model
from keye.train.recipes.nano.initialise import fresh_model
from keye.weights.safetensors import WEIGHTS_FILE
from tests.support.tiny import NANO, tiny_folder, tiny_raw

PREVIEW, V1_5, V2 = (
    "KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration", "KeyeVL2MoeForConditionalGeneration",
)  # fmt: skip


def checkpoint(folder: Path, architecture: str) -> Path:
    """A model folder of this architecture, in shards."""
    raw = tiny_raw() | {"architectures": [architecture], "torch_dtype": "float32"}
    tiny_folder(folder, weights=False)
    (folder / "config.json").write_text(json.dumps(raw))
    save_model(fresh_model(model_config_from_dict(raw), 0), folder, shard_bytes=100_000)
    return folder


@pytest.mark.parametrize(("architecture", "attention"), [(PREVIEW, "dense"), (V1_5, "dense"), (V2, "sparse")])
def test_every_release_answers(architecture: str, attention: str, tmp_path: Path) -> None:
    model = keye.load(checkpoint(tmp_path / "model", architecture))
    answer = model.ask([Image.new("RGB", (112, 56), color) for color in ("red", "blue")], "what?", max_tokens=4)
    assert answer.attention == attention
    assert answer.usage.media_tokens == 2 * 8
    assert 0 <= answer.usage.completion_tokens <= 4


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def prompt_text(model: keye.Keye, **options: object) -> str:
    return "".join(str(segment.value) for segment in model.render([{"role": "user", "content": "hi"}], **options))


def test_a_checkpoint_is_used_with_its_own_formats(tmp_path: Path) -> None:
    """Chat template and frame text where the checkpoint brings them, keye's own where not; the notes tell which."""
    folder = checkpoint(tmp_path / "model", V2)
    (folder / "preprocessor_config.json").unlink()
    notes = " ".join(keye.load(folder).notes)
    assert "brings no chat template" in notes and "brings no frame_text" in notes
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "video_preprocessor_config.json").write_text('{"frame_text": "<{seconds:.2f}>"}')
    model = keye.load(folder)
    assert prompt_text(model) == "[user]hi[assistant]"
    assert model.processor.config.frame_text == "<{seconds:.2f}>"
    notes = " ".join(model.notes)
    assert "checkpoint's own chat template" in notes and "labelled by the frame_text of the checkpoint" in notes
    (folder / "preprocessor_config.json").write_text('{"keye": {}}')
    assert "checkpoint's own chat template" in " ".join(keye.load(folder).notes), "of one that keye wrote too"
    (folder / "preprocessor_config.json").unlink()
    ours = keye.load(folder, template="keye")
    assert prompt_text(ours) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not any("template" in note for note in ours.notes), "it was asked for"


def test_tools_where_the_template_of_a_checkpoint_has_no_place_for_them(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", V1_5)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tools = [{"name": "look"}]
    with pytest.warns(KeyeWarning, match="keye's own template is used with tools"):
        assert "<tools>" in prompt_text(keye.load(folder), tools=tools)
    with pytest.raises(KeyeError, match="has no place for tools"):
        prompt_text(keye.load(folder, template="checkpoint"), tools=tools)


def test_a_checkpoint_without_indexer_answers_densely_and_says_so(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    state = {n: t for n, t in load_file(folder / WEIGHTS_FILE).items() if ".sa_indexer." not in n}
    save_file(state, folder / WEIGHTS_FILE)
    model = keye.load(folder)
    picture = Image.new("RGB", (112, 56), "red")
    assert model.ask(picture, "what?", max_tokens=2).attention == "dense"
    with pytest.raises(KeyeError, match="has no sparse-attention indexer; leave attention out or set it to dense"):
        model.ask(picture, "what?", max_tokens=2, attention="sparse")


def test_preview_places_a_video_by_its_seconds() -> None:
    """Four frames half a second apart are one run of tokens whose time axis takes one step a frame (2 a second)."""
    config = model_config_from_dict(tiny_raw() | {"architectures": [PREVIEW]})
    vision = VisionInput(np.zeros((4 * 8, 3, 14, 14), np.float32), np.array([[4, 2, 4]]))
    video = MediaItem("video", vision, (VisualSpan("video", 8),), second_per_grid=1.0)
    builder = PromptBuilder(config, Tokenizer.from_file(NANO), Processor(load_processor_config(NANO)))
    ids = [config.vision_start_token_id, *[config.video_token_id] * 8, config.vision_end_token_id]
    prompt = builder._positioned(ids, [video])
    assert prompt.position_ids[0].tolist() == [0, 1, 1, 3, 3, 5, 5, 7, 7, 8]
    assert prompt.next_position == 9
    assert torch.equal(prompt.position_ids[:, 0], torch.zeros(3, dtype=torch.int64))
