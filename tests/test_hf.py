"""transformers' Auto classes load Keye through keye.hf, and compute what keye computes."""

import gc
import importlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import keye
from keye.cache.ledger import Ledger
from keye.config import model_config_from_dict
from keye.engine.step import ALONE_TOKENS
from keye.errors import KeyeError, KeyeWarning
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import save_model
from keye.train.recipes.nano.initialise import fresh_model

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install keye[hf]")
import keye.hf
from tests.support.reference import PlainSequence
from tests.support.tiny import tiny_folder, tiny_raw

TALK = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (84, 56), "red")}, "what is it?"]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("hf") / "tiny")


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, **options)
    return model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def own_prompt(model: keye.Keye, messages: Any) -> Any:
    return model.runtime.prompts.build(messages, template=model.runtime.template)


def greedy(model: keye.Keye, messages: Any, tokens: int) -> list[int]:
    return PlainSequence(model.model, model.runtime.attention).prefill(own_prompt(model, messages)).greedy(tokens)


def test_auto_classes(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(config, keye.hf.KeyeVL2ConfigHF) and config.hidden_size == 64
    assert config.keye.text.sparse.topk == 16
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=False)
        assert isinstance(model, keye.hf.KeyeVL2MoeForConditionalGeneration)
        assert isinstance(model.network, KeyeModel) and model.dtype == torch.bfloat16
    assert isinstance(transformers.AutoProcessor.from_pretrained(folder), keye.hf.KeyeVL2Processor)


RELEASES = {
    "KeyeForConditionalGeneration": ("Keye", "KeyeProcessor"),
    "KeyeVL1_5ForConditionalGeneration": ("KeyeVL1_5", "KeyeVL1_5Processor"),
    "KeyeVL2MoeForConditionalGeneration": ("KeyeVL2", "KeyeVL2Processor"),
}


@pytest.mark.parametrize("architecture", RELEASES)
def test_every_release(architecture: str, folder: Path, tmp_path: Path) -> None:
    """A folder as published: the processor is named in its file, code is offered and not taken."""
    kind, processor_class = RELEASES[architecture]
    raw = tiny_raw() | {"architectures": [architecture], "model_type": kind}
    raw["auto_map"] = {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    named = json.loads((folder / "preprocessor_config.json").read_text()) | {"processor_class": processor_class}
    named["auto_map"] = {"AutoProcessor": "processing.Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(named))
    save_model(fresh_model(model_config_from_dict(raw), 0), tmp_path)
    model, processor = load(tmp_path)
    assert (model.config.model_type, type(processor).__name__) == (kind, processor_class)
    inputs = processor.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == greedy(keye.load(tmp_path), TALK, 4)


def test_logits_and_ids_are_keyes_own(folder: Path) -> None:
    model, processor = load(folder, dtype="float32")
    own = keye.load(folder, dtype="float32")
    prompt = own_prompt(own, TALK)
    inputs = processor.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)
    assert inputs["input_ids"].tolist() == [prompt.token_ids.tolist()]
    assert inputs["position_ids"][:, 0].tolist() == prompt.position_ids.tolist()
    logits = model(**inputs).logits
    expected = PlainSequence(own.model).prefill(prompt).logits
    torch.testing.assert_close(logits[0, -1], expected)
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits[0, 0], expected)
    ids = model.generate(**inputs, max_new_tokens=12, eos_token_id=-1)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == greedy(own, TALK, 12)


def test_keye_nano_answers_the_same(folder: Path) -> None:
    model, processor = load(asset("nano"))
    own = keye.load("nano")
    talk = [{"role": "user", "content": [{"type": "video", "video": str(asset("demo.mp4"))},
                                         "when is the cyan triangle visible?"]}]  # fmt: skip
    inputs = processor.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=32)
    reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert reply == own.chat(talk).text and "[[" in reply


def test_rows_of_a_batch_are_computed_as_alone(folder: Path) -> None:
    model, processor = load(folder, dtype="float32")
    talks = [TALK, [{"role": "user", "content": "hello there, what do you see?"}], TALK]
    together = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    assert together["attention_mask"].sum(1).tolist()[1] < together["input_ids"].shape[1]
    ids = model.generate(**together, max_new_tokens=5, eos_token_id=-1)
    for row, talk in enumerate(talks):
        alone = processor.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
        assert torch.equal(model.generate(**alone, max_new_tokens=5, eos_token_id=-1)[0, -5:], ids[row, -5:])
    length = int(together["attention_mask"][1].sum())
    alone = processor.apply_chat_template(talks[1], tokenize=True, add_generation_prompt=True)
    padded = model(**together).logits[1]
    torch.testing.assert_close(padded[-length:], model(**alone).logits[0])
    assert not padded[:-length].any()


def test_positions_follow_from_the_grids(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor.apply_chat_template([TALK, TALK], tokenize=True, add_generation_prompt=True)
    expected = model(**inputs).logits
    del inputs["position_ids"]
    assert torch.equal(model(**inputs).logits, expected)


def test_texts_with_media(folder: Path) -> None:
    _, processor = load(folder)
    text = processor.apply_chat_template(TALK, add_generation_prompt=True)
    assert text.count("<|image_pad|>") == 1
    inputs = processor(text=[text], images=[TALK[0]["content"][0]["image"]])  # type: ignore[index]
    again = processor.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)
    assert all(torch.equal(inputs[name], again[name]) for name in again)
    with pytest.raises(KeyeError, match="more image placeholders than"):
        processor(text=text)
    with pytest.raises(KeyeError, match="more images than"):
        processor(text="x", images=[Image.new("RGB", (56, 56))])


def test_sampling_is_repeatable_and_replies_end(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)
    draw = [
        model.generate(**inputs, do_sample=True, temperature=2.0, seed=seed, max_new_tokens=6) for seed in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    first = model.generate(**inputs, max_new_tokens=1)[0, -1:].tolist()
    ended = model.generate(**inputs, max_new_tokens=9, eos_token_id=first)
    assert ended.shape[1] == inputs["input_ids"].shape[1] + 1 and ended[0, -1:].tolist() == first


def test_saving_and_loading(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["mrope_section"] == [4, 6, 6]
    again, _ = load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    keye.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_in_4bit": True}, "unknown option load_in_4bit"),
        ({"device_map": {"model": "cpu", "lm_head": "cuda"}}, "one device"),
        ({"device_map": "nowhere"}, "cannot be used here"),
    ],
)
def test_options_that_keye_does_not_know(options: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(KeyeError, match=sentence):
        load(folder, **options)


def test_inputs_that_keye_does_not_know(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor.apply_chat_template(TALK, tokenize=True)
    with pytest.raises(KeyeError, match="unknown input labels"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(KeyeError, match="visual tokens"):
        model(inputs["input_ids"])


def test_code_in_the_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    evil = Path(shutil.copytree(folder, tmp_path / "evil"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_keye", "modeling_keye", "processing_keye"):
        (evil / f"{name}.py").write_text(code)
    for file, names in (
        ("config.json", {"AutoConfig": "configuration_keye.C", "AutoModelForImageTextToText": "modeling_keye.M"}),
        ("preprocessor_config.json", {"AutoProcessor": "processing_keye.P"}),
    ):
        content = json.loads((evil / file).read_text())
        (evil / file).write_text(json.dumps({**content, "auto_map": names}))
    load(evil)
    assert not (tmp_path / "ran").exists()


def test_torchvision_is_not_needed(folder: Path) -> None:
    program = (
        "import sys; sys.modules['torchvision'] = None\nimport keye.hf\nfrom transformers import AutoProcessor\n"
        "AutoProcessor.from_pretrained(sys.argv[1]); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


#: By architecture: type of model, utilities of the official script, options of process_vision_info.
SCRIPTS = {
    "KeyeForConditionalGeneration": ("Keye", "utils_preview", {"return_video_kwargs": True}),
    "KeyeVL1_5ForConditionalGeneration": ("KeyeVL1_5", "utils_1_5", {}),
    "KeyeVL2MoeForConditionalGeneration": ("KeyeVL2", "utils_1_5", {}),
}


def release_folder(folder: Path, to: Path, architecture: str) -> Path:
    """A tiny folder of a release under the official budgets of its media; 2.0 has those of keye-nano."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(folder / name, to / name)
    if architecture != "KeyeVL2MoeForConditionalGeneration":
        plain = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520}
        (to / "preprocessor_config.json").write_text(json.dumps(plain))
    raw = tiny_raw() | {"architectures": [architecture], "model_type": SCRIPTS[architecture][0]}
    (to / "config.json").write_text(json.dumps(raw))
    save_model(fresh_model(model_config_from_dict(raw), 0), to)
    return to


@pytest.mark.parametrize("architecture", SCRIPTS)
def test_the_official_script(architecture: str, folder: Path, tmp_path: Path) -> None:
    _, utilities, extra = SCRIPTS[architecture]
    process_vision_info = importlib.import_module(f"keye.compat.{utilities}").process_vision_info
    model, processor = load(release_folder(folder, tmp_path, architecture))
    video = {"type": "video", "video": str(asset("demo.mp4")), "fps": 1, "max_frames": 8}
    if architecture != "KeyeVL2MoeForConditionalGeneration":
        video["max_pixels"] = 128 * 784
    messages = [{"role": "user", "content": [video, TALK[0]["content"][0], {"type": "text", "text": "What?"}]}]  # type: ignore[index]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, mm_kwargs = process_vision_info(messages, **extra)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt", **mm_kwargs)
    own = keye.load(tmp_path)
    prompt = own_prompt(own, messages)
    assert inputs["input_ids"].tolist() == [prompt.token_ids.tolist()]
    assert inputs["position_ids"][:, 0].tolist() == prompt.position_ids.tolist()
    clip = next(item for item in prompt.media if item.kind == "video").vision.tensors()
    assert torch.equal(inputs["video_grid_thw"], clip[1])
    if architecture != "KeyeVL2MoeForConditionalGeneration":  # whose files are resized while they are decoded
        assert torch.equal(inputs["pixel_values_videos"], clip[0])
    if "timestamps" in mm_kwargs:
        assert "<|frame|>2.0" in processor.decode(inputs["input_ids"][0], skip_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=3, eos_token_id=-1)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3
    if architecture != "KeyeVL2MoeForConditionalGeneration":
        assert ids[0, -3:].tolist() == greedy(own, messages, 3)


def test_settings_of_videos_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    _, processor = load(folder)
    frames = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    with pytest.raises(KeyeError, match="unknown option colour"):
        processor(text="<|video_pad|>", videos=[frames], colour=[1])
    with pytest.raises(KeyeError, match="timestamps has 2 entries for 1 videos"):
        processor(text="<|video_pad|>", videos=[frames], timestamps=[[0.0, 1.0]] * 2)
    preview = load(release_folder(folder, tmp_path, "KeyeForConditionalGeneration"))[1]
    with pytest.raises(KeyeError, match="utils_preview"):
        preview(text="<|video_pad|>", videos=[frames], height=[56])
    frames = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
    small = processor(text="<|video_pad|>", videos=[frames], fps=[0.4], height=[56], width=[56])
    assert small["video_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert "<|frame|>2.5" in processor.decode(small["input_ids"][0], skip_special_tokens=False)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu", torch.device("cpu"), None])
def test_device_maps(device_map: Any, folder: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map)
    assert device_map == "auto" or model.device == torch.device("cpu")


@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "eager"])
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_attention_is_keyes_own(attention: str, auto: str, folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = getattr(transformers, auto).from_pretrained(
            folder, attn_implementation=attention, torch_dtype=torch.float32, trust_remote_code=True
        )
    assert [str(w.message) for w in caught if w.category is KeyeWarning] == [
        f"attn_implementation='{attention}' has no effect; keye chooses its own attention"
    ]
    assert model.dtype == torch.float32
    assert "attn_implementation" not in model.config.to_dict()


def test_limits_of_a_processor(folder: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder, min_pixels=4 * 784, max_pixels=6 * 784)
    picture = Image.new("RGB", (336, 336))

    def patches(**options: Any) -> int:
        talk = [{"role": "user", "content": [{"type": "image", "image": picture, **options}]}]
        return int(processor.apply_chat_template(talk, tokenize=True)["image_grid_thw"].prod())

    assert patches() == 4 * 4  # a square of at most 6 tokens has 4
    assert patches(max_pixels=9 * 784) == 4 * 9
    value = processor(text="<|image_pad|>", images=[picture])
    assert value["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(KeyeError, match="min_pixels=9 is above max_pixels=8"):
        transformers.AutoProcessor.from_pretrained(folder, min_pixels=9, max_pixels=8)


def test_rows_padded_at_the_right(folder: Path) -> None:
    model, left = load(folder, dtype="float32")
    right = transformers.AutoProcessor.from_pretrained(folder, padding_side="right")
    texts = ["hello", "hello, what do you see there?"]
    inputs = right(text=texts)
    assert inputs["attention_mask"][0, 0] == 1 and inputs["attention_mask"][0, -1] == 0
    ids = [model.generate(**item, max_new_tokens=4, eos_token_id=-1)[:, -4:] for item in (left(text=texts), inputs)]
    assert torch.equal(*ids)
    with pytest.raises(KeyeError, match="left or right"):
        transformers.AutoProcessor.from_pretrained(folder, padding_side="top")


def test_length_and_beams(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor(text="hello")
    length = inputs["input_ids"].shape[1]
    fine = {"num_beams": 1, "temperature": None, "eos_token_id": -1}
    assert model.generate(**inputs, max_length=length + 3, **fine).shape[1] == length + 3
    assert model.generate(**inputs, max_length=length, max_new_tokens=2, **fine).shape[1] == length + 2
    with pytest.raises(KeyeError, match="max_length is"):
        model.generate(**inputs, max_length=length)
    with pytest.raises(KeyeError, match="without beams"):
        model.generate(**inputs, num_beams=4)


def test_generate_frees_its_memory_at_once(folder: Path) -> None:
    model, processor = load(folder)
    talk = [{"role": "user", "content": "what do you see? " * 30}]  # longer than a block, so that prefixes are kept
    text = processor.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
    picture = processor.apply_chat_template(TALK, tokenize=True, add_generation_prompt=True)

    def count_used() -> int:
        return sum(item.used() for item in gc.get_objects() if type(item) is Ledger)

    def fail_in_reply(_: Any, inputs: Any) -> None:
        if inputs[0].shape[0] == 1:
            raise RuntimeError("broken")

    gc.collect()
    gc.disable()
    try:
        before = count_used()
        for inputs in (text, picture, text):
            model.generate(**inputs, max_new_tokens=2, eos_token_id=-1)
            assert count_used() == before
        model.network.model.register_forward_pre_hook(fail_in_reply)
        with pytest.raises(RuntimeError, match="broken"):
            model.generate(**text, max_new_tokens=2, eos_token_id=-1)
        assert count_used() == before
    finally:
        gc.enable()


def test_long_rows_are_computed_in_chunks(folder: Path) -> None:
    model, _ = load(folder, dtype="float32")
    ids = torch.randint(20, 300, (1, 2 * ALONE_TOKENS + 70), generator=torch.Generator().manual_seed(0))
    rows: list[int] = []
    hook = model.network.model.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    logits = model(ids, logits_to_keep=2).logits
    hook.remove()
    assert rows == [ALONE_TOKENS, ALONE_TOKENS, 70]
    plain = PlainSequence(model.network)
    torch.testing.assert_close(logits[0, -1], plain.append(ids[0].tolist()).logits)
