"""GGUF files that keye writes: they hold the checkpoint, in the sizes that are known, and appear when complete."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keye.config import load_model_config, model_config_from_dict, read_json
from keye.errors import KeyeError
from keye.hub import asset, resolve
from keye.models.load import load_model, save_model
from keye.models.outline import outline
from keye.train.recipes.nano.initialise import fresh_model
from keye.weights.export import export_text, export_vision, plan_text, plan_vision
from keye.weights.gguf.convert import write_conversion
from keye.weights.gguf.mixes import text_types
from keye.weights.gguf.reader import read_gguf
from keye.weights.gguf.write import lay_out
from keye.weights.names import file_tensors
from keye.weights.open import open_weights
from keye.weights.plain import write_plain
from keye.weights.safetensors import open_checkpoint, write_checkpoint
from keye.weights.source import MemoryTensor
from tests.support.disk import largest_file
from tests.support.latent import latent_folder
from tests.support.tiny import tiny_folder, tiny_raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model on this machine, float32."""
    model, _ = load_model(folder, load_model_config(folder), dtype=torch.float32, quant="none")
    return dict(model.state_dict())


@pytest.mark.parametrize(("text", "vision"), [("F32", "BF16"), ("BF16", "F16"), ("Q8_0", "Q8_0"), ("Q4_K_M", "F16")])
def test_a_model_of_two_files_has_the_weights_of_the_checkpoint(folder, tmp_path, text, vision):
    export_text(folder, tmp_path / "model.gguf", text)
    export_vision(folder, tmp_path / "mmproj-model.gguf", vision)
    read, wanted = tensors(resolve(tmp_path / "model.gguf")), tensors(folder)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        kind = vision if name.startswith(("visual.", "mlp_AR.")) else text
        error = float((read[name] - tensor).norm() / tensor.norm().clamp_min(1e-9))
        assert error <= {"F32": 0, "BF16": 0, "F16": 1e-3, "Q8_0": 0.01, "Q4_K_M": 0.06}[kind], name


NO_EXPERTS = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "sa_config": None}
RELEASES = {
    "preview": {"architectures": ["KeyeForConditionalGeneration"], **NO_EXPERTS},
    "1.5": {"architectures": ["KeyeVL1_5ForConditionalGeneration"], **NO_EXPERTS},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", [*RELEASES, "671B"])
def test_every_release_is_read_back_as_it_was(tmp_path, name):
    folder = tmp_path / "model"
    if name == "671B":
        latent_folder(folder, float8=True)
    else:
        tiny_folder(folder, weights=False)
        raw = tiny_raw() | RELEASES[name]
        (folder / "config.json").write_text(json.dumps(raw))
        save_model(fresh_model(model_config_from_dict(raw), 0), folder, dtype=torch.bfloat16)
    export_text(folder, tmp_path / "model.gguf", "F32")
    export_vision(folder, tmp_path / "mmproj-model.gguf", "BF16")
    again = resolve(tmp_path / "model.gguf")
    read, wanted = tensors(again), tensors(folder)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in wanted.items())
    before, after = load_model_config(folder), load_model_config(again)
    assert (after.release, after.vision) == (before.release, before.vision)
    texts = [replace(config.text, mrope_section=(), draft_layers=0) for config in (before, after)]
    assert texts[0] == texts[1]


def test_the_file_is_written_as_it_was_planned(folder, tmp_path):
    plan = plan_text(read_json(folder / "config.json"), open_weights(folder), "Q3_K_M")
    export_text(folder, tmp_path / "model.gguf", "Q3_K_M")
    file = read_gguf(tmp_path / "model.gguf")
    assert {t.name: (t.type.name, t.shape) for t in file.tensors.values()} == dict(plan.tensors)
    assert file.metadata["general.file_type"] == 12
    assert file.metadata["general.architecture"] == "keye-vl2"


def test_text_alone_is_a_model_of_experts_without_indexer(folder, tmp_path):
    export_text(folder, tmp_path / "text.gguf", "BF16", text_only=True)
    file = read_gguf(tmp_path / "text.gguf")
    assert file.metadata["general.architecture"] == "qwen3moe"
    assert not any("indexer" in name for name in (*file.tensors, *file.metadata))
    assert file.metadata["qwen3moe.expert_count"] == 4


def test_experts_that_are_stored_one_by_one_give_the_same_file(folder, tmp_path):
    shapes = {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}
    modules = {name.rpartition(".")[0] for name in shapes if name.endswith("gate_up_proj")}
    single = {piece: view(tensor).contiguous() for name, tensor in shapes.items()
              for piece, view in file_tensors(name, tuple(tensor.shape), modules)}  # fmt: skip
    other = tmp_path / "single"
    write_checkpoint(single, other)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    for source, path in ((folder, tmp_path / "fused.gguf"), (other, tmp_path / "single.gguf")):
        export_text(source, path, "Q8_0")
    assert (tmp_path / "fused.gguf").read_bytes() == (tmp_path / "single.gguf").read_bytes()
    write_plain(open_checkpoint(other), tmp_path / "back", torch.bfloat16)
    back = {name: tensor.read() for name, tensor in open_checkpoint(tmp_path / "back").items()}
    assert back.keys() == shapes.keys()
    assert all(torch.equal(back[name], shapes[name]) for name in shapes)


# Sizes


def real_sources(name: str) -> tuple[dict, dict[str, MemoryTensor]]:
    """config.json and tensors of a published model, on the meta device."""
    raw = read_json(asset(f"configs/{name}") / "config.json")
    meta = torch.device("meta")
    return raw, {name: MemoryTensor(torch.empty(shape, dtype=torch.bfloat16, device=meta))
                 for name, shape in outline(raw).shapes.items()}  # fmt: skip


def test_vision_parts_of_2_0_have_the_sizes_of_the_official_files():
    _, sources = real_sources("2.0")
    sizes = {kind: lay_out({}, plan_vision(sources, kind).tensors).size for kind in ("BF16", "F16", "Q8_0")}
    assert {kind: round(size / 2**20) for kind, size in sizes.items()} == {"BF16": 922, "F16": 921, "Q8_0": 613}


def test_text_of_2_0_has_the_sizes_that_llama_cpp_lists_for_its_geometry():
    raw, sources = real_sources("2.0")
    sizes = {kind: lay_out({}, plan_text(raw, sources, kind, text_only=True).tensors).size / 2**30
             for kind in ("BF16", "Q8_0", "Q4_K_M", "Q3_K_M")}  # fmt: skip
    assert sizes == pytest.approx({"BF16": 56.89, "Q8_0": 30.25, "Q4_K_M": 17.28, "Q3_K_M": 13.70}, abs=0.005)


@pytest.mark.parametrize("name", ["preview", "1.5", "2.0", "671b"])
def test_every_tensor_of_a_published_model_has_a_place(name):
    raw, sources = real_sources(name)
    text, vision = plan_text(raw, sources, "Q4_K_M"), plan_vision(sources, "Q8_0")
    count = sum(math.prod(shape) for plan in (text, vision) for _, shape in plan.tensors.values())
    assert count == sum(math.prod(source.shape) for source in sources.values())


def test_formats_are_those_of_files_that_llama_cpp_quantised():
    golden = Path(__file__).parents[1] / "golden" / "gguf"
    for case, layers, experts in (("case-00", 2, 0), ("case-01", 1, 4)):
        recorded = json.loads((golden / f"{case}.json").read_text())["formats"]
        for path in sorted(golden.glob(f"{case}-*.gguf")):
            kind = path.stem.removeprefix(f"{case}-")
            if kind in ("Q8_0", "Q4_K_M", "Q3_K_M", "F16"):
                shapes = {tensor.name: tensor.shape for tensor in read_gguf(path).tensors.values()}
                assert text_types(shapes, kind, layers=layers, experts=experts) == recorded[kind]["types"]


# Failures


def spoil(folder: Path, to: Path, value: float) -> Path:
    """A copy of a model in which one number is `value`."""
    values = {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}
    values["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
    write_checkpoint(values, to)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "F32"), (math.inf, "Q4_K_M"), (1e6, "F16")])
def test_numbers_that_a_file_cannot_hold_are_one_sentence(folder, tmp_path, value, kind):
    bad, out = spoil(folder, tmp_path / "bad", value), tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyeError, match=r"model.layers.1.self_attn.o_proj.weight holds .*[:;] (fetch|convert)"):
        export_text(bad, out / "model.gguf", kind)
    assert not list(out.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder, tmp_path):
    with largest_file(50_000), pytest.raises(KeyeError, match="no room is left to write .*model.gguf"):
        export_text(folder, tmp_path / "model.gguf", "F32")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(KeyeError, match=r"model.gguf takes 1.24 MiB, but 1000 B are free there"):
        export_text(folder, tmp_path / "model.gguf", "F32")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_is_continued(folder, tmp_path):
    class Counted(MemoryTensor):
        def pieces(self, target):
            reads.append(self)
            return super().pieces(target)

    reads: list[Counted] = []
    raw = read_json(folder / "config.json")
    sources = {name: Counted(tensor.read()) for name, tensor in open_checkpoint(folder).items()}
    plan, path = plan_text(raw, sources, "Q8_0"), tmp_path / "model.gguf"

    def interrupt(done: int, total: int) -> None:
        if done > total * 0.99:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_conversion(path, plan, {}, interrupt, fingerprint="a")
    assert not path.exists()
    first = len(reads)
    write_conversion(path, plan, {}, fingerprint="a")
    assert len(reads) - first < len(plan.recipes) / 2
    complete = tmp_path / "complete.gguf"
    write_conversion(complete, plan, {}, fingerprint="a")
    assert path.read_bytes() == complete.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"model.gguf", "complete.gguf"}


@pytest.mark.slow
def test_a_conversion_that_is_killed_is_continued(folder, tmp_path):
    path = tmp_path / "model.gguf"
    program = (
        "import os, signal, sys; from pathlib import Path; from keye.weights.export import export_text\n"
        "def kill(done, total): done < 0.99 * total or os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_text(Path(sys.argv[1]), Path(sys.argv[2]), 'Q8_0', on_progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(path)])
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    shares: list[float] = []
    export_text(folder, path, "Q8_0", on_progress=lambda done, total: shares.append(done / total))
    assert shares[0] > 0.5
    export_text(folder, tmp_path / "complete.gguf", "Q8_0")
    assert path.read_bytes() == (tmp_path / "complete.gguf").read_bytes()


def test_a_draft_that_another_process_completed_meanwhile_is_left_alone(folder, tmp_path, monkeypatch):
    path, flock = tmp_path / "m.gguf", fcntl.flock

    def complete_first(descriptor: int, operation: int) -> None:
        os.replace(tmp_path / ".m.gguf.part", path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", complete_first)
    (tmp_path / ".m.gguf.part").write_bytes(b"complete")
    with pytest.raises(KeyeError, match="being written by another process"):
        export_text(folder, path, "F16")
    assert path.read_bytes() == b"complete"


def test_a_tokenizer_of_another_model_is_one_sentence(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 5000, "content": "<|other|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(KeyeError, match="ids from 0 to 5000, the model a table of 1792 rows"):
        export_text(folder, tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_draft_of_another_checkpoint_is_not_continued(folder, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total * 0.8:
            raise KeyboardInterrupt

    raw, path = read_json(folder / "config.json"), tmp_path / "model.gguf"
    sources = {name: MemoryTensor(tensor.read()) for name, tensor in open_checkpoint(folder).items()}
    with pytest.raises(KeyboardInterrupt):
        write_conversion(path, plan_text(raw, sources, "F32"), {}, interrupt, fingerprint="a")
    changed = {name: MemoryTensor(source.tensor * 2) for name, source in sources.items()}
    write_conversion(path, plan_text(raw, changed, "F32"), {}, fingerprint="b")
    write_conversion(tmp_path / "other.gguf", plan_text(raw, changed, "F32"), {}, fingerprint="b")
    assert path.read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_unknown_tensors_are_named(folder):
    raw, extra = read_json(folder / "config.json"), {"model.layers.0.surprise.weight": MemoryTensor(torch.ones(2, 2))}
    with pytest.raises(KeyeError, match="no place for: model.layers.0.surprise.weight"):
        plan_text(raw, {**open_checkpoint(folder), **extra}, "F32")
