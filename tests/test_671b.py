"""A tiny checkpoint of Keye-VL-671B through the front doors: Python, the command line, HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import keye
from keye.cli import main
from keye.errors import KeyeError
from keye.weights.open import open_weights
from tests.support.engine import conversation, generate_alone, greedy, run_together, write_clip
from tests.support.latent import latent_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_folder(tmp_path_factory.mktemp("large") / "tiny-671b", float8=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> keye.Keye:
    return keye.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (112, 56), "red").save(folder / "picture.png")
    return {"image": folder / "picture.png", "video": write_clip(folder / "clip.mp4")}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_ask(kind: str, folder: Path, media: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    words = ["ask", media[kind], "what is it?", "--model", folder, "--max-tokens", 4, "--json"]
    assert main([str(word) for word in words]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["usage"]["media_tokens"] > 0 and result["attention"] == "dense"


def test_serve(model: keye.Keye, media: dict[str, Path]) -> None:
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from keye.server.app import guarded_app
    from keye.server.settings import Settings
    from tests.support.attack_cases import data_url

    with TestClient(guarded_app(model, Settings()), base_url="http://localhost") as http:
        for kind, path in media.items():
            form = {"image": "image/png", "video": "video/mp4"}[kind]
            part = {"type": f"{kind}_url", f"{kind}_url": {"url": data_url(path.read_bytes(), form)}}
            content = [part, {"type": "text", "text": "what is it?"}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
            answer = http.post("/v1/chat/completions", json=body).json()
            want = model.ask(path, "what is it?", max_tokens=4, temperature=0).text
            assert answer["choices"][0]["message"]["content"] == want


def test_requests_together_give_what_each_gives_alone(model: keye.Keye) -> None:
    conversations = [conversation(seed) for seed in range(4)]
    tokens, _ = run_together(model, [greedy(model, messages) for messages in conversations])
    assert tokens == [generate_alone(model, messages) for messages in conversations]


def test_prefixes_and_indexes_hold_latents(model: keye.Keye, media: dict[str, Path], tmp_path: Path) -> None:
    first = model.ask(media["video"], "what is red?", max_tokens=6, temperature=0)
    again = model.ask(media["video"], "what is red?", max_tokens=6, temperature=0)
    assert again.usage.cached_tokens >= 64 and again.text == first.text
    model.index(media["video"], tmp_path / "clip.keye")
    assert model.ask(tmp_path / "clip.keye", "what is red?", max_tokens=6, temperature=0).text == first.text


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_small_number_formats_of_the_cache(kv: str, folder: Path, media: dict[str, Path]) -> None:
    model = keye.load(folder, kv=kv)  # type: ignore[arg-type]
    assert model.runtime.store.layout.kind == kv
    assert model.ask(media["image"], "what?", max_tokens=3).usage.completion_tokens > 0


def test_weights_in_int4(folder: Path, media: dict[str, Path]) -> None:
    model = keye.load(folder, quant="int4")
    assert model.ask(media["image"], "what?", max_tokens=3).usage.completion_tokens > 0


def test_quantised_and_converted_files_answer(
    folder: Path, model: keye.Keye, media: dict[str, Path], tmp_path: Path
) -> None:
    """The draft layer is left out of both, and what float8 holds is what they are made from."""
    words = ["quantize", folder, "--to", "int8", "-o", tmp_path / "int8"]
    assert main([str(word) for word in words]) == 0
    assert main(["convert", str(folder), "--type", "f32", "-o", str(tmp_path / "large.gguf")]) == 0
    words = ["convert", folder, "--mmproj", "--type", "f16", "-o", tmp_path / "mmproj-large.gguf"]
    assert main([str(word) for word in words]) == 0
    assert main(["convert", str(folder), "--to", "safetensors", "-o", str(tmp_path / "plain")]) == 0
    bias = open_weights(tmp_path / "plain")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == "F32", "the router's bias decides between nearly equal scores"
    assert keye.load(tmp_path / "plain").ask(media["image"], "what?", max_tokens=2).usage.completion_tokens > 0
    want = model.ask(media["image"], "what?", max_tokens=6, temperature=0)
    gguf = keye.load(tmp_path / "large.gguf", dtype="float32").ask(media["image"], "what?", max_tokens=6, temperature=0)
    assert gguf.text == want.text
    eight = keye.load(tmp_path / "int8").ask(media["image"], "what?", max_tokens=6, temperature=0)
    assert eight.usage.media_tokens == want.usage.media_tokens and eight.usage.completion_tokens > 0


def test_every_token_takes_one_position(model: keye.Keye) -> None:
    """Without mrope_section visual tokens count as text does."""
    prompt = model.runtime.prompts.build(
        [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (112, 56))}]}]
    )
    assert prompt.position_ids.tolist() == [list(range(len(prompt.token_ids)))] * 3
    assert prompt.next_position == len(prompt.token_ids)


def test_the_template_of_the_checkpoint_is_used_with_its_tokens(model: keye.Keye) -> None:
    segments = model.render([{"role": "user", "content": "hi"}])
    assert "".join(str(segment.value) for segment in segments).startswith("<|endoftext|><|im_start|>user\nhi")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [("chat_template.jinja", "keye has no chat template for Keye-VL 671B"), ("tokenizer.json", "does not exist")],
)
def test_tokenizer_and_template_must_come_with_the_checkpoint(missing: str, sentence: str, tmp_path: Path) -> None:
    folder = latent_folder(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(KeyeError, match=sentence) as raised:
        keye.load(folder)
    assert "\n" not in str(raised.value)


def test_keyes_own_template_cannot_be_chosen(folder: Path) -> None:
    with pytest.raises(KeyeError, match="keye has no chat template for Keye-VL 671B"):
        keye.load(folder, template="keye")
