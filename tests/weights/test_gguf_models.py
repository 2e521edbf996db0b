"""Models in GGUF files: names, metadata and tokens both ways, parts that do not belong together, and answers."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file

import keye
from benchmarks.fuzz_gguf import damage, read_everything
from keye.config import load_model_config, model_config_from_dict, read_json
from keye.errors import KeyeError
from keye.hub import asset, resolve
from keye.models.keye import KeyeModel
from keye.models.load import load_model, load_tensors, loaded_bytes, save_model
from keye.models.quant_fill import quantized_weights
from keye.server.settings import Settings
from keye.weights.gguf.metadata import text_metadata
from keye.weights.gguf.names import Sizes, read_vision_recipes
from keye.weights.gguf.reader import GGUF, read_gguf
from keye.weights.gguf.source import open_gguf
from keye.weights.gguf.tokens import read_tokenizer, token_metadata
from tests.support.gguf import Draft, Entry, model_entries, plain, write_model
from tests.support.serving import Running
from tests.support.tiny import tiny_folder

Edit = Mapping[str, Sequence[Entry]]


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model in float32 and its vision part."""
    return write_model(folder, tmp_path, kind="F32")


def rewrite(path: Path, edit: Edit | None = None, **metadata: Any) -> Path:
    """A file with other tensors in the place of some, and other metadata; both None for none."""
    file = read_gguf(path)
    data = path.read_bytes()
    entries = []
    for tensor in file.tensors.values():
        old = Entry(tensor.name, tensor.shape, data[tensor.start : tensor.start + tensor.nbytes], tensor.type.number)
        entries += [old] if edit is None or tensor.name not in edit else edit[tensor.name]
    values = {**file.metadata, **metadata}
    return Draft({name: item for name, item in values.items() if item is not None}, entries).write(path)


def stored(path: Path, name: str) -> np.ndarray:
    """A float32 tensor of a file."""
    tensor = read_gguf(path).tensors[name]
    data = path.read_bytes()[tensor.start : tensor.start + tensor.nbytes]
    return np.frombuffer(data, "<f4").reshape(tensor.shape)


def assert_same_model(files: tuple[Path, Path], folder: Path) -> None:
    """The files hold the tensors of the folder, bit for bit."""
    link = resolve(files[0])
    model, report = load_model(link, load_model_config(link))
    want, _ = load_model(folder, load_model_config(folder))
    assert not report.unused
    assert model.state_dict().keys() == want.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want.state_dict()[name]), name


def test_a_model_in_gguf_has_the_tensors_and_the_config_of_its_checkpoint(
    files: tuple[Path, Path], folder: Path
) -> None:
    assert_same_model(files, folder)
    config, want = read_json(resolve(files[0]) / "config.json"), read_json(folder / "config.json")
    ignored = {"model_type", "hidden_act", "attention_bias", "decoder_sparse_step", "mlp_only_layers", "bos_token_id"}
    want["sa_config"].pop("indexer_num_kv_heads")
    want["vision_config"].pop("num_channels")
    config["vision_config"].pop("layer_norm_eps")
    assert {name: config.get(name) for name in want if name not in ignored} == {
        name: value for name, value in want.items() if name not in ignored
    }


def one_indexer_matrix(path: Path, spelling: str) -> None:
    joined = {}
    for layer in range(2):
        q, gates = (stored(path, f"blk.{layer}.indexer.{part}.weight") for part in ("q_proj", "proj"))
        joined[f"blk.{layer}.indexer.q_proj.weight"] = [plain(f"blk.{layer}.{spelling}", np.concatenate([q, gates]))]
        joined[f"blk.{layer}.indexer.proj.weight"] = []
    rewrite(path, joined)


@pytest.mark.parametrize("spelling", ["indexer.q_proj.weight", "indexer.attn_q_b.weight", "sa_indexer.wq.weight"])
def test_the_indexers_queries_may_hold_its_gates(spelling: str, files: tuple[Path, Path], folder: Path) -> None:
    one_indexer_matrix(files[0], spelling)
    assert_same_model(files, folder)


@pytest.mark.parametrize(
    "spellings",
    [
        {"q_proj": "indexer.attn_q", "proj": "indexer.weights_proj", "k_proj": "indexer.attn_k"},
        {"q_proj": "indexer_q", "proj": "indexer_gates", "k_proj": "indexer_keys", "k_norm": "indexer_norm_k"},
        {"q_norm": "attn_indexer.attn_q_norm", "k_norm": "attn_indexer.attn_k_norm", "proj": "indexer.unheard_of"},
    ],
)
def test_indexers_are_recognised_by_name_or_shape(
    spellings: Mapping[str, str], files: tuple[Path, Path], folder: Path
) -> None:
    edit = {}
    for name in read_gguf(files[0]).tensors:
        layer, _, rest = name.partition(".indexer.")
        module, _, leaf = rest.partition(".")
        if module in spellings:
            edit[name] = [plain(f"{layer}.{spellings[module]}.{leaf}", stored(files[0], name))]
    rewrite(files[0], edit)
    assert_same_model(files, folder)


@pytest.mark.parametrize("joined", [True, False])
def test_the_size_of_an_indexer_follows_from_its_tensors(joined: bool, files: tuple[Path, Path], folder: Path) -> None:
    if joined:
        one_indexer_matrix(files[0], "indexer.q_proj.weight")
    keys = ("head_count", "key_length", "top_k")
    rewrite(files[0], **{f"keye-vl2.attention.indexer.{key}": None for key in keys})
    sparse = read_json(resolve(files[0]) / "config.json")["sa_config"]
    assert sparse == {"indexer_num_heads": 2, "indexer_head_dim": 16, "topk": 2048}
    assert_same_model(files, folder)
    rewrite(files[0], {"blk.0.indexer.k_norm.weight": [plain("blk.0.indexer.k_norm.weight", np.ones(5))]})
    with pytest.raises(KeyeError, match="neither its metadata nor its shapes tell"):
        resolve(files[0])


def test_names_that_are_not_known_are_listed(files: tuple[Path, Path]) -> None:
    rewrite(files[0], {"output_norm.weight": [plain("blk.0.strange.weight", [1.0]), plain("other", [1.0])]})
    with pytest.raises(KeyeError, match=r"whose place keye does not know: blk\.0\.strange\.weight, other"):
        open_gguf(files[0])
    rewrite(files[1], {"v.post_ln.weight": [plain("v.class_embd", np.ones((7, 7)))]})
    with pytest.raises(
        KeyeError, match=r"mmproj-model\.gguf has tensors whose place keye does not know: v\.class_embd"
    ):
        read_vision_recipes({t.name: t.shape for t in read_gguf(files[1]).tensors.values()}, str(files[1]))


def test_half_a_tensor_is_an_error(files: tuple[Path, Path]) -> None:
    rewrite(files[0], {"blk.1.indexer.proj.weight": []})
    with pytest.raises(KeyeError, match=r"has blk\.1\.indexer\.q_proj\.weight but not its other part \(proj\)"):
        open_gguf(files[0])
    rewrite(files[0], {"blk.1.indexer.q_proj.weight": [], "output_norm.weight": []})
    link = resolve(files[0])
    with pytest.raises(KeyeError, match=r"missing: model\.layers\.1\.self_attn\.sa_indexer\.q_proj.*model\.norm"):
        load_model(link, load_model_config(link))


def test_towers_of_other_converters_are_read(files: tuple[Path, Path], folder: Path) -> None:
    """One matrix of queries, keys and values; the MLP's matrices exchanged; other names in the projector; a packing
    table."""
    vision = files[1]
    edit: dict[str, list[Entry]] = {}
    for leaf in ("weight", "bias"):
        names = [f"v.blk.0.attn_{letter}.{leaf}" for letter in "qkv"]
        edit |= {name: [] for name in names}
        edit[names[0]] = [plain(f"v.blk.0.attn_qkv.{leaf}", np.concatenate([stored(vision, n) for n in names]))]
        for old, new in (("ffn_up", "ffn_down"), ("ffn_down", "ffn_up")):
            edit[f"v.blk.0.{old}.{leaf}"] = [plain(f"v.blk.0.{new}.{leaf}", stored(vision, f"v.blk.0.{old}.{leaf}"))]
        for old, new in (("mm.input_norm", "proj.norm"), ("mm.1", "proj.a"), ("mm.2", "proj.b")):
            edit[f"{old}.{leaf}"] = [plain(f"{new}.{leaf}", stored(vision, f"{old}.{leaf}"))]
    patches = stored(vision, "v.patch_embd.weight")
    edit["v.patch_embd.weight"] = [
        plain("v.patch_embd.weight", patches.reshape(len(patches), -1)), plain("any.table", np.ones((50, 32))),
    ]  # fmt: skip
    rewrite(vision, edit, **{"clip.projector_type": "paddleocr", "clip.vision.image_size": 560})
    assert_same_model(files, folder)
    link = resolve(files[0])
    _, report = load_model(link, load_model_config(link))
    assert report.ignored == ("visual.vision_model.embeddings.packing_position_embedding.weight",)


def test_parts_that_do_not_belong_together_get_one_sentence(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, vision = files
    with pytest.raises(KeyeError, match=r"is the vision part of a model \(mmproj\); give the model's file"):
        resolve(vision)
    with pytest.raises(KeyeError, match="is not the vision part of a model"):
        resolve(model, mmproj=model)
    with pytest.raises(KeyeError, match=r"gone\.gguf does not exist"):
        resolve(model, mmproj=tmp_path / "gone.gguf")
    (tmp_path / "mmproj-2.gguf").write_bytes(vision.read_bytes())
    with pytest.raises(KeyeError, match="beside .* are 2 vision parts"):
        resolve(model)
    (tmp_path / "mmproj-2.gguf").unlink()
    wider = stored(vision, "mm.2.weight").repeat(2, 0)
    rewrite(vision, {"mm.2.weight": [plain("mm.2.weight", wider)]})
    with pytest.raises(
        KeyeError, match="the vision part of another model: its tokens have 128 numbers, those of model"
    ):
        resolve(model)
    rewrite(vision, {"mm.input_norm.weight": [plain("mm.input_norm.weight", np.ones(32))]})
    with pytest.raises(KeyeError, match="is the vision part of Keye-VL Preview"):
        resolve(model)
    rewrite(vision, **{"clip.projector_type": "qwen3vl_merger"})
    with pytest.raises(KeyeError, match=r"vision part of another model \(projector 'qwen3vl_merger'\)"):
        resolve(model)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama'; keye reads keye-vl2, qwen3moe"),
        ({"general.type": "adapter"}, "of type adapter; give one of a model"),
        ({"keye-vl2.block_count": "two"}, r"keye-vl2\.block_count two; keye needs one number there"),
        ({"keye-vl2.block_count": None}, r"lacks keye-vl2\.block_count"),
        ({"keye-vl2.attention.head_count": np.array([2, 1])}, "keye needs one number there"),
        ({"keye-vl2.rope.dimension_sections": np.array([1, 1, 1, 0])}, "mrope_section"),
        ({"keye-vl2.context_length": None}, r"lacks keye-vl2\.context_length"),
        ({"keye-vl2.rope.scaling.type": "yarn"}, r"keye-vl2\.rope\.scaling\.type yarn, which keye does not run"),
        ({"keye-vl2.rope.scaling.factor": 4.0}, r"keye-vl2\.rope\.scaling\.factor 4, which keye does not run"),
        ({"keye-vl2.rope.dimension_count": 16}, r"keye-vl2\.rope\.dimension_count 16, which keye does not run"),
        ({"tokenizer.ggml.tokens": 3}, "tokens that are not texts"),
        ({"tokenizer.huggingface.json": "[]"}, "not a JSON object"),
        ({"tokenizer.huggingface.json": None, "tokenizer.ggml.pre": "llama-bpe"}, "keye reads gpt2/qwen2"),
        ({"keye.file.preprocessor_config.json": "{"}, "not a JSON object"),
    ],
)
def test_metadata_that_lie_get_one_sentence(metadata: dict[str, Any], sentence: str, files: tuple[Path, Path]) -> None:
    rewrite(files[0], **metadata)
    with pytest.raises(KeyeError, match=sentence):
        keye.load(files[0])


def test_numbers_that_llama_cpp_takes_for_granted_may_lack(files: tuple[Path, Path]) -> None:
    keys = ("rope.freq_base", "attention.head_count_kv")
    rewrite(files[0], **{"keye-vl2.attention.head_count": 1, **{f"keye-vl2.{key}": None for key in keys}})
    raw = read_json(resolve(files[0]) / "config.json")
    assert (raw["rope_theta"], raw["num_key_value_heads"]) == (10000, 1)


def test_a_type_that_keye_does_not_read_is_named(files: tuple[Path, Path]) -> None:
    rewrite(files[0], {"output.weight": [Entry("output.weight", (1792, 64), bytes(1792 * 36), 20)]})
    with pytest.raises(KeyeError, match=r"lm_head\.weight is IQ4_NL"):
        keye.load(files[0])


def test_a_model_without_its_vision_part_answers_text_alone(files: tuple[Path, Path], folder: Path) -> None:
    files[1].unlink()
    model = keye.load(files[0])
    want = keye.load(folder)
    question = [{"role": "user", "content": "is there a red circle?"}]
    assert model.chat(question, max_tokens=8).text == want.chat(question, max_tokens=8).text
    with pytest.raises(KeyeError) as error:
        model.ask(asset("demo.mp4"), "when?")
    assert "loaded without its vision part and reads text alone" in str(error.value.args[0])


def test_a_folder_of_gguf_files_is_a_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(files[0])
    (tmp_path / "b.gguf").write_bytes(files[0].read_bytes())
    with pytest.raises(KeyeError, match=r"several models or none \(b\.gguf, model\.gguf\)"):
        resolve(tmp_path)


def test_text_models_of_llama_cpp_are_read(tmp_path: Path) -> None:
    """Without sections of the rotary embedding, indexer and head of its own, under the name of Qwen's model."""
    raw = read_json(tiny_folder(tmp_path / "tiny") / "config.json")
    config = {**raw, "tie_word_embeddings": True, "sa_config": None}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    model, _ = load_model(tmp_path / "tiny", load_model_config(tmp_path / "tiny"), strict=False)
    save_model(model, tmp_path / "tiny")
    path, vision = write_model(
        tmp_path / "tiny", tmp_path, kind="F32", architecture="qwen3moe", **{"qwen3moe.rope.dimension_sections": None}
    )
    vision.unlink()
    link = resolve(path)
    read = load_model_config(link)
    assert (read.text.tie_word_embeddings, read.text.sparse, read.text.mrope_section) == (True, None, (4, 6, 6))
    assert not read.has_vision
    own, _ = load_model(link, read)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_tokens_are_the_same_both_ways() -> None:
    """A tokenizer with Qwen's pre-tokenizer needs no copy of its file in the metadata."""
    described = read_json(asset("nano") / "tokenizer.json")
    described["normalizer"] = {"type": "NFC"}
    split = described["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    letters = list(described["model"]["vocab"])
    described["model"] |= {"ignore_merges": False, "merges": []}
    pairs = [word for word in letters if len(word) == 2 and word[0] in letters and word[1] in letters]
    described["model"]["merges"] = [f"{word[0]} {word[1]}" for word in pairs]
    size = len(letters) + len(described["added_tokens"]) + 5
    metadata = token_metadata(described, size)
    assert "tokenizer.huggingface.json" not in metadata
    assert read_tokenizer(GGUF(Path("x.gguf"), 3, metadata, {}), size) == described


@pytest.fixture(scope="module")
def nano_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """keye-nano in Q8_0."""
    return write_model(asset("nano"), tmp_path_factory.mktemp("gguf"), kind="Q8_0")


def test_quantised_bits_are_kept_unless_another_dtype_is_asked_for(nano_files: tuple[Path, Path]) -> None:
    model = keye.load(nano_files[0])
    assert model.name == "model"
    weight = model.model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert str(weight.format) == "int8 per 32"  # type: ignore[attr-defined]
    weights = quantized_weights(model.model).values()
    size = sum(parameter.nbytes for parameter in model.model.parameters())
    size += sum(weight.tensor.nbytes for weight in weights)
    assert loaded_bytes(resolve(nano_files[0]), model.config, torch.bfloat16) == size
    plain_model = keye.load(nano_files[0], dtype="float32")
    up = plain_model.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(weight.tensor.dequantize().transpose(1, 2), up)  # type: ignore[attr-defined]


@pytest.fixture
def server(nano_files: tuple[Path, Path]) -> Iterator[str]:
    running = Running(keye.load(*nano_files[:1], mmproj=nano_files[1]), Settings(served_names=("KeyeVL2",)))
    yield running.url
    running.stop()


def test_the_script_of_the_gguf_card_works_unchanged(server: str, clips: list[Path]) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="EMPTY")
    picture = base64.b64encode(_picture(clips[0])).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "what objects are in the image?"},
    ]  # fmt: skip
    answer = client.chat.completions.create(
        model="KeyeVL2", messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0.0
    )
    assert answer.model == "KeyeVL2"
    assert answer.choices[0].message.content


def _picture(clip: Path) -> bytes:
    import av

    with av.open(str(clip)) as container:
        frame = next(container.decode(video=0)).to_image()
    path = clip.with_suffix(".png")
    frame.save(path)
    return path.read_bytes()


def test_the_decoder_of_the_671b_model_is_read(tmp_path: Path) -> None:
    """Keys and values apart and transposed as llama.cpp stores them, stacked experts, sigmoid routing, yarn."""
    case = Path(__file__).parents[1] / "golden" / "latent" / "case-01"
    raw = {**read_json(case.with_suffix(".json"))["config"], "vision_config": None}
    weights = {name[2:]: t for name, t in load_file(case.with_suffix(".safetensors")).items() if name.startswith("w.")}
    config = model_config_from_dict(raw)
    want = KeyeModel(config)
    load_tensors(want, weights)
    sizes = Sizes(0, 0, raw["num_attention_heads"], raw["qk_nope_head_dim"], raw["v_head_dim"])
    entries = model_entries(want.state_dict(), sizes, "F32")
    assert {f"blk.1.attn_{part}_b.weight" for part in "kv"} < {entry.name for entry in entries}
    metadata = {"general.architecture": "deepseek2", **text_metadata(raw, "deepseek2")}
    link = resolve(Draft(metadata, entries).write(tmp_path / "a.gguf"))
    read = load_model_config(link)
    assert read.text == config.text
    model, report = load_model(link, read, dtype=torch.float32)
    assert not report.unused
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want.state_dict()[name]), name


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("original")
    return write_model(tiny_folder(place / "tiny"), place, kind="Q8_0")


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_files_are_read_or_rejected_with_a_sentence(
    which: int, originals: tuple[Path, Path], tmp_path: Path
) -> None:
    """benchmarks/fuzz_gguf.py does this for minutes."""
    content, chance, sentences = originals[which].read_bytes(), random.Random(which), []
    files = list(originals)
    files[which] = tmp_path / originals[which].name
    for _ in range(40):
        files[which].write_bytes(damage(content, 2500, chance))
        try:
            read_everything(files[0], files[1], chance)
        except KeyeError as error:
            sentences.append(str(error))
    assert len(sentences) > 20
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("name", ["KeyeForConditionalGeneration", "KeyeVL1_5ForConditionalGeneration"])
def test_the_release_follows_from_both_files(name: str, tmp_path: Path) -> None:
    """Preview and 1.5 share the name of the language model: the projector's norm tells them apart."""
    raw = {**read_json(tiny_folder(tmp_path / "tiny", weights=False) / "config.json"), "architectures": [name]}
    raw = {key: value for key, value in raw.items() if "expert" not in key and key != "sa_config"}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(raw))
    model = KeyeModel(load_model_config(tmp_path / "tiny"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, tmp_path / "tiny", dtype=torch.bfloat16)
    files = write_model(tmp_path / "tiny", tmp_path, kind="F32", architecture="qwen3")
    assert load_model_config(resolve(files[0])).architecture == name
    assert_same_model(files, tmp_path / "tiny")
