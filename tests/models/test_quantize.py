"""A checkpoint is quantised to a new folder: from every layout, resumed after a stop, complete or not there."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keye.config import load_model_config
from keye.errors import KeyeError
from keye.files import DiskFull
from keye.models import quantize as module
from keye.models.importance import observe_squares
from keye.models.load import load_model
from keye.models.quant_fill import quantized_weights
from keye.models.quantize import REPORT_FILE, QuantReport, quantize_checkpoint
from keye.quant.policy import make_policy
from keye.weights.safetensors import INDEX_FILE, WEIGHTS_FILE, ShardWriter, open_checkpoint
from keye.weights.source import WeightsError
from tests.models.test_checkpoints import EXTRAS, LAYOUTS, write
from tests.models.test_quantised import same_bits

INT4 = make_policy("int4")
Case = tuple[Path, Any]


@pytest.fixture
def source(tmp_path: Path, make_model: Any, raw_config: dict[str, Any]) -> Path:
    state = {name: t.bfloat16() for name, t in make_model().state_dict().items()}
    folder = write(tmp_path / "source", {**raw_config, "torch_dtype": "bfloat16"}, {**state, **EXTRAS})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_keye.py").write_text("raise SystemExit")
    return folder


def run(source: Path, out: Path, **options: Any) -> QuantReport:
    return quantize_checkpoint(source, load_model_config(source), out, options.pop("policy", INT4), **options)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_what_loading_makes_of_it(
    make_model: Any, raw_config: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    overrides, rename, shards = LAYOUTS[layout]
    model = make_model(**overrides)
    source = write(tmp_path / "source", {**raw_config, **overrides}, rename(model.state_dict()), shards)
    config = load_model_config(source)
    kind, out = "fp8" if shards > 1 else "int4", tmp_path / "out"
    quantize_checkpoint(source, config, out, make_policy(kind))
    direct, _ = load_model(source, config, quant=kind)
    assert same_bits(load_model(out, load_model_config(out))[0], direct)
    assert load_model_config(out) == direct.config or layout.endswith("indexer")


def test_the_result_is_complete(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = run(source, tmp_path / "out", on_progress=lambda done, total: steps.append((done, total)))
    assert names(tmp_path) == {"source", "out"}
    assert names(tmp_path / "out") == {"config.json", WEIGHTS_FILE, REPORT_FILE, "tokenizer.json"}
    with safe_open(tmp_path / "out" / WEIGHTS_FILE, "pt") as file:  # as other programs read it
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert sum(sizes.values()) == report.bytes and not set(EXTRAS) & set(sizes)
    saved = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert saved["bytes"] == report.bytes and len(saved["rows"]) == len(report.rows)
    assert saved["dropped"] == sorted(EXTRAS) and saved["dropped_bytes"] == sum(t.nbytes for t in EXTRAS.values())
    assert report.source_bytes == sum(t.nbytes for n, t in open_checkpoint(source).items() if n not in EXTRAS)
    assert steps[-1] == (report.source_bytes, report.source_bytes)
    by_part = {row.part: row for row in report.rows}
    assert by_part["experts"].format == "int4 per 64" and 0.03 < by_part["experts"].error < 0.13
    assert by_part["router"].error is None and by_part["indexer"].format == "int8 per row"
    assert 0.5 < report.share < 1


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    expected = run(source, tmp_path / "whole")
    shards = len(list((tmp_path / "whole").glob("model-*")))
    assert shards > 3 and (tmp_path / "whole" / INDEX_FILE).exists()

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(source, tmp_path / "out", on_progress=stop)
    partial = tmp_path / ".out.part"
    complete = {file.name: file.stat().st_mtime_ns for file in partial.glob("model-*.safetensors")}
    assert 0 < len(complete) < shards and not (tmp_path / "out").exists()
    with open(partial / "journal.jsonl", "a") as journal:
        journal.write('{"shard": "torn')
    steps: list[int] = []
    assert run(source, tmp_path / "out", on_progress=lambda done, total: steps.append(done)) == expected
    assert steps[0] > 0 and not partial.exists()
    for file in (tmp_path / "whole").glob("model-*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in complete.items()), "not again"


def test_another_policy_or_source_starts_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)

    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(source, tmp_path / "out", on_progress=stop)
    run(source, tmp_path / "out", policy=make_policy("int8"))
    config = load_model_config(tmp_path / "out")
    weights = quantized_weights(load_model(tmp_path / "out", config)[0])
    assert {weight.format.kind for weight in weights.values()} == {"int8"}


def test_the_folder_that_is_written_is_guarded(source: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        run(source, tmp_path / "out")

    with pytest.raises(KeyeError, match="another process is writing"):
        run(source, tmp_path / "out", on_progress=again)
    run(source, tmp_path / "out")
    with pytest.raises(KeyeError, match="exists: name another folder, or give overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", policy=make_policy("int8"), overwrite=True)
    assert names(tmp_path) == {"source", "out"}
    with pytest.raises(KeyeError, match="is not an earlier result"):
        run(source, source, overwrite=True)
    with pytest.raises(KeyeError, match="in one that exists"):
        run(source, tmp_path / "none" / "out")
    for name in (".", ".."):
        with pytest.raises(KeyeError, match="name a new folder"):
            run(source, Path(name))


def test_bad_sources_leave_no_result(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int4")
    with pytest.raises(WeightsError, match=r"quantised already \(int4\)"):
        run(tmp_path / "int4", tmp_path / "out")
    good = load_file(source / WEIGHTS_FILE)
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.down_proj"):
        bad = {**good, name: good[name].clone()}
        bad[name].view(-1)[7] = torch.inf
        save_file(bad, source / WEIGHTS_FILE)
        with pytest.raises(WeightsError, match=rf"{name} holds NaN or infinite"):
            run(source, tmp_path / "out")
    save_file(good, source / WEIGHTS_FILE)
    with open(source / WEIGHTS_FILE, "r+b") as file:
        file.truncate((source / WEIGHTS_FILE).stat().st_size - 1000)
    with pytest.raises(WeightsError, match=r"model\.safetensors .*it is cut short"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 1000))
        with pytest.raises(DiskFull, match=r"are needed to write .*out, and 1000 B are free"):
            run(source, tmp_path / "out")

    def full(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(DiskFull, match="no room is left"):
            run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out")


def test_what_no_list_keeps_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("int4")
    others = {part: form for part, form in policy.parts.items() if part != "experts"}
    with pytest.raises(KeyeError, match=r"% of the weights would not be quantised, model\.layers\.0\.mlp\.experts"):
        run(source, tmp_path / "out", policy=type(policy)("int4", others))
    assert run(source, tmp_path / "out", policy=type(policy)("int4", {**others, "experts": None})).share < 0.7


def test_inputs_that_count_more_are_kept_better(
    source: Path, tmp_path: Path, make_prompt: Any, run_chunks: Any
) -> None:
    model, _ = load_model(source, load_model_config(source), dtype=torch.float32)
    with observe_squares(model) as squares:
        run_chunks(model, make_prompt(0, 40), [40])
    counts = squares.means()
    weights = {n: w.shape for n, w in quantized_weights(load_model(source, model.config, quant="int4")[0]).items()}
    text = {n for n in weights if n.startswith(("model.layers", "lm_head"))} - {"lm_head.weight"}
    assert text <= set(counts)
    for name in text:
        experts = weights[name][:1] if len(weights[name]) == 3 else ()
        assert counts[name].shape == (*experts, weights[name][-1]) and bool((counts[name] > 0).all())
    draw = torch.Generator().manual_seed(0)
    counts = {name: mean * torch.rand(mean.shape[-1], generator=draw) ** 6 for name, mean in counts.items()}
    calls = []
    report = run(source, tmp_path / "out", calibrate=lambda: calls.append(1) or counts, calibration="forty tokens")
    plain = run(source, tmp_path / "plain")
    rows, others = ({row.part: row for row in r.rows} for r in (report, plain))
    assert others["experts"].weighted_error is None
    assert rows["experts"].weighted_error < 0.93 * others["experts"].error < 0.93 * rows["experts"].error
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["calibration"] == "forty tokens" and calls == [1]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(source: Path, tmp_path: Path) -> None:
    """As a user meets it: SIGKILL in the middle, the same command again."""
    program = (
        "import sys, os, signal; from pathlib import Path; from keye.models import quantize as m\n"
        "from keye.config import load_model_config; from keye.quant.policy import make_policy\n"
        "m.SHARD_BYTES, m.BATCH_BYTES = 20_000, 1\n"
        "source, out, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == 'kill'\n"
        "def step(done, total):\n"
        "    if kill and done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "m.quantize_checkpoint(source, load_model_config(source), out, make_policy('int4'), on_progress=step)\n"
    )
    for out, kill, code in (("out", "kill", -9), ("out", "", 0), ("straight", "", 0)):
        command = [sys.executable, "-c", program, str(source), str(tmp_path / out), kill]
        assert subprocess.run(command, check=False).returncode == code
        assert (tmp_path / out).exists() == (code == 0)
    for file in (tmp_path / "straight").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
