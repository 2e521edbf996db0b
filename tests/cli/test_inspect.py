"""`keye inspect`: published models from their configurations, folders with and without weights, narrow terminals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from keye.commands.inspect import activation_bytes, fit
from keye.config import read_json
from keye.hub import asset
from keye.models.outline import outline
from keye.planning.machines import machine_table, markdown_table
from keye.process import Memory, main_memory
from tests.support.latent import latent_folder


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No published checkpoint is on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("name", "total", "kv", "indexer"),
    [
        ("preview", 8_681_590_384, 147_456, 0),
        ("Kwai-Keye/Keye-VL-1_5-8B", 8_681_597_296, 147_456, 0),
        ("2.0", 31_122_082_160, 98_304, 6_144),
        ("671b", 671_531_439_984, 70_272, 0),
    ],
)
def test_published_models_by_name(run: Callable, name: str, total: int, kv: int, indexer: int) -> None:
    data = run("inspect", name, "--json").data
    assert data["parameters"]["total"] == total == sum(data["parameters"]["parts"].values())
    assert data["bytes"]["bfloat16"] == 2 * total
    assert data["kv_bytes_per_token"]["bfloat16"] == kv
    assert data["indexer_bytes_per_token"]["bfloat16"] == indexer
    assert data["folder"] is None
    assert "ships with keye" in data["notes"][0]


def test_parts_of_the_published_2_0(run: Callable) -> None:
    data = run("inspect", "2.0", "--json").data
    parts = data["parameters"]["parts"]
    assert parts["indexer"] == 108_536_832
    assert parts["projector"] == 30_686_720
    assert parts["vision tower"] + parts["packing table (never read)"] == 450_735_984
    assert parts["experts"] == 48 * 128 * 3 * 2048 * 768
    assert data["parameters"]["read"] == data["parameters"]["total"] - 37_748_736
    assert data["indexer_bytes_per_token"]["float8"] == 3_264
    assert data["context"] == 262_144


def test_a_folder_with_nothing_but_its_configuration(run: Callable, tmp_path: Path) -> None:
    shutil.copyfile(asset("configs/1.5") / "config.json", tmp_path / "config.json")
    data = run("inspect", tmp_path, "--json").data
    assert data["parameters"]["total"] == 8_681_597_296
    assert (data["folder"], data["files"], data["tokenizer"], data["template"]) == (str(tmp_path), None, None, None)


def test_a_cached_checkpoint_goes_before_our_copy(run: Callable, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--Kwai-Keye--Keye-VL-2.0-30B-A3B/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    raw = read_json(asset("configs/2.0") / "config.json") | {"num_hidden_layers": 2}
    (snapshot / "config.json").write_text(json.dumps(raw))
    data = run("inspect", "2.0", "--json").data
    assert (data["folder"], data["text"]["num_hidden_layers"], data["notes"]) == (str(snapshot), 2, [])


def test_weights_are_counted_and_compared(run: Callable, own_model: Path) -> None:
    weights = own_model / "model.safetensors"
    state = load_file(weights)
    extra = {"visual.vision_model.head.probe": state["lm_head.weight"][:1, :32].clone()}
    save_file(state | extra, weights)
    data = run("inspect", own_model, "--json").data
    assert data["parameters"]["total"] == sum(t.numel() for t in (state | extra).values())
    assert data["parameters"]["read"] == sum(t.numel() for t in state.values())
    assert data["files"]["fits_config"] is True
    assert data["files"]["ignored"] == list(extra)
    assert data["files"]["bytes"] == sum(t.nbytes for t in (state | extra).values())
    assert "they fit config.json" in run("inspect", own_model).out

    save_file({n: t for n, t in state.items() if ".sa_indexer." not in n}, weights)
    assert "dense attention" in run("inspect", own_model, "--json").data["notes"][0]

    del state["lm_head.weight"]
    save_file(state, weights)
    result = run("inspect", own_model)
    assert result.code == 0
    assert "do not fit config.json" in result.out and "missing: lm_head.weight" in result.out


def test_weights_that_cannot_be_read_are_a_note(run: Callable, own_model: Path) -> None:
    (own_model / "model.safetensors").write_bytes(b"cut short")
    data = run("inspect", own_model, "--json").data
    assert data["files"] is None
    assert "cannot be read as safetensors" in data["notes"][0]


def test_tokenizer_template_and_sampling(run: Callable, own_model: Path) -> None:
    data = run("inspect", own_model, "--json").data
    assert data["tokenizer"]["disagreements"] == []
    assert data["tokenizer"]["thinks"] and "<|frame|>" in data["tokenizer"]["frame_marks"]
    assert data["template"] is None
    assert data["sampling"]["stop_ids"] == [1752, 1750]
    (own_model / "chat_template.jinja").write_text("{% if tools %}{{ tools }}{% endif %}{{ 1/0 }}<|image_pad|>")
    raw = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(raw | {"image_token_id": 1, "vocab_size": 1760}))
    (own_model / "model.safetensors").unlink()
    data = run("inspect", own_model, "--json").data
    assert data["template"] == {"file": "chat_template.jinja", "characters": 58, "knows": ["tools", "images"]}
    assert data["tokenizer"]["disagreements"] == [
        "<|image_pad|> is 1756 but image_token_id is 1", "1787 tokens but vocab_size 1760",
    ]  # fmt: skip
    assert "disagrees" in run("inspect", own_model).out


@pytest.mark.parametrize("width", [32, 60, 100])
@pytest.mark.parametrize("model", ["nano", "2.0", "671b"])
def test_text_fits_the_terminal(run: Callable, model: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = run("inspect", model)
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= width
    assert "…" not in result.out
    totals = {"nano": "13,277,888", "2.0": "31,122,082,160", "671b": "671,531,439,984"}
    assert totals[model] in result.out


def test_text_says_what_the_data_says(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [Memory("cpu", 80 * 10**9, 70 * 10**9), Memory("cuda:0", 24 * 10**9, 24 * 10**9)]
    monkeypatch.setattr("keye.process.memories", lambda: memory)
    monkeypatch.setattr("keye.planning.machines.read_bandwidth", lambda device: 100e9)
    monkeypatch.setenv("COLUMNS", "100")
    out = " ".join(run("inspect", "2.0").out.split())
    assert "16 indexer heads of 64 choose 2,048 keys" in out
    assert "8 of 128 for each token, width 768" in out
    assert "16-bit 58 GiB 98,304 B 6,144 B" in out
    assert "8-bit (official server) 3,264 B" in out
    assert "cpu 65.2 GiB of 74.5 GiB free" in out
    assert "16-bit fits with 68,611 tokens of context" in out
    assert "32-bit does not fit: the weights take 116 GiB" in out
    assert "int4 fits with" in out and "int8 29 GiB" in out
    assert "recommended int4: 15.6 GiB of weights" in out and "on cuda:0" in out


def test_the_table_of_the_documentation_is_that_of_the_command(run: Callable) -> None:
    """If this fails, replace the table in docs/hardware.md by what `keye inspect --machines` prints."""
    lines = list(markdown_table(machine_table()))
    assert "\n".join(lines) in (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")
    assert run("inspect", "--machines").out.splitlines() == lines
    rows = run("inspect", "--machines", "--json").data["machines"]
    assert rows == json.loads(json.dumps(machine_table()))
    result = run("inspect", "nano", "--machines")
    assert result.code == 2 and "one of the two" in result.err


def test_unusable_models_are_one_sentence(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for model, sentence in (
        (tmp_path, "LlamaForCausalLM is not supported"),
        (tmp_path / "gone", "does not exist"),
        ("2.1", "Unknown model '2.1'"),
    ):
        result = run("inspect", model)
        assert (result.code, result.out) == (2, "")
        assert sentence in result.err and result.err.count("\n") == 1
    raw = read_json(asset("configs/671b") / "config.json")
    del raw["kv_lora_rank"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert "lacks kv_lora_rank" in run("inspect", tmp_path).err


def test_text_from_files_cannot_steer_the_terminal(run: Callable, own_model: Path) -> None:
    raw = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(raw | {"\x1b[31mred": 1}))
    assert "\x1b" not in run("inspect", own_model).out


# What fits


@pytest.mark.parametrize(
    ("free", "context", "limit"),
    [(0, 0, None), (1999, 0, None), (2000 + 3455, 0, None), (2000 + 3456 * 7, 7, "memory"), (10**12, 16384, "model")],
)  # fmt: skip
def test_the_context_that_fits(free: int, context: int, limit: str | None) -> None:
    """keye-nano takes 3,072 + 384 bytes a token; here 1,000 parameters are two bytes each. `free` is what activations
    leave."""
    nano = outline(read_json(asset("nano") / "config.json"))
    assert nano.config is not None
    got = fit(nano, 2000, Memory("cpu", 10**12, free + activation_bytes(nano.config, 2)), "bfloat16")
    assert (got["context"], got["fits"], got["limited_by"]) == (context, context > 0, limit)


def test_memory_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000 kB\nMemFree: 100 kB\nMemAvailable:   6000 kB\nHugePages_Total:       0\n")
    group = tmp_path / "group"
    assert main_memory(meminfo, group) == Memory("cpu", 8_192_000, 6_144_000)
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    assert main_memory(meminfo, group) == Memory("cpu", 8_192_000, 6_144_000)
    (group / "memory.max").write_text("4000000\n")
    assert main_memory(meminfo, group) == Memory("cpu", 4_000_000, 3_000_000)
    assert main_memory(tmp_path / "gone", group) is None


def test_a_quantised_folder_says_what_it_holds(run: Callable, tmp_path: Path) -> None:
    assert run("quantize", "nano", "--to", "int4", "-o", tmp_path / "int4").code == 0
    data, plain = run("inspect", tmp_path / "int4", "--json").data, run("inspect", "nano", "--json").data
    assert data["parameters"] == plain["parameters"] and data["files"]["fits_config"]
    assert data["quantization"]["kind"] == "int4" and plain["quantization"] is None
    assert {fit["dtype"] for fit in data["fits"]} == {"int4"} and data["fits"][0]["weights"] == data["files"]["bytes"]
    rows = json.loads((tmp_path / "int4/quantization.json").read_text())["rows"]
    error = next(row["error"] for row in rows if row["part"] == "experts")
    text = run("inspect", tmp_path / "int4").out
    assert "quantised to int4" in text and "int8 per row" in text and 0.05 < error < 0.15 and f"{error:.2%}" in text
    for damage in ("{", "[]", '{"version": 1, "rows": [{"part": "x"}]}'):
        (tmp_path / "int4/quantization.json").write_text(damage)
        text = run("inspect", tmp_path / "int4").out
        assert "quantised to int4" in text and "indexer" in text


def test_what_no_single_device_holds(run: Callable) -> None:
    data = run("inspect", "671b", "--json").data
    assert data["cards_of_80_gb"] == {"bf16": 32, "fp8": 16, "int8": 16, "int4": 8}
    assert any("at least 32 in 16-bit" in note and "8 in int4" in note for note in data["notes"])
    assert "it must come with the checkpoint" in run("inspect", "671b").out
    assert "8 in int4 (359 GB of weights)" in run("plan", "--model", "671b", "--video", "2m").out
    assert "16 in float8 (674 GB of weights)" in run("plan", "--model", "671b", "--ram", "384GiB").out
    assert run("inspect", "2.0", "--json").data["cards_of_80_gb"] is None


def test_a_float8_checkpoint(run: Callable, tmp_path: Path) -> None:
    data = run("inspect", latent_folder(tmp_path / "model", float8=True), "--json").data
    assert data["files"]["fits_config"] and data["files"]["bytes_by_dtype"].keys() == {"BF16", "F32", "F8_E4M3"}
    assert {name.split(".")[2] for name in data["files"]["ignored"]} == {"3"}, "the draft layer"
