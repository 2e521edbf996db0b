"""Merging adapters and models, and the search for the weights of an average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import keye
from keye import KeyeError
from keye.cli import main
from keye.config import model_config_from_dict
from keye.models.load import load_model, save_model
from keye.train.config import LoraSettings
from keye.train.lora import add_lora, save_adapter
from keye.train.merge import Average, MergeError, complete_weights, merge_adapter
from keye.train.merge_search import TRIALS_FILE, find_best, search_weights
from keye.train.recipes.nano.initialise import fresh_model
from tests.models.test_weights import per_expert
from tests.support.tiny import tiny_config, tiny_folder, tiny_raw
from tests.train.test_lora import IDS, engine_log_probs, fill


def make_models(folder: Path, count: int) -> list[Path]:
    """Folders of models that differ in their weights."""
    folders = [tiny_folder(folder / str(number), weights=False) for number in range(count)]
    for number, own in enumerate(folders):
        save_model(fresh_model(tiny_config(), number), own, dtype=torch.float32)
    return folders


def make_adapter(folder: Path, **settings: Any) -> Path:
    model, _ = load_model(tiny_folder(folder / "of"), tiny_config(), dtype=torch.float32)
    lora = add_lora(model, LoraSettings(rank=4, **settings))
    fill(lora)
    return save_adapter(lora, folder / "adapter")


def run_cli(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("split", [False, True], ids=["fused", "expert by expert"])
def test_a_merged_model_computes_what_the_adapter_computes(split: bool, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    if split:
        save_file(per_expert(load_file(base / "model.safetensors")), base / "model.safetensors")
    adapter = make_adapter(tmp_path, experts=True, targets=("all-linear", "projector", "router"))
    assert run_cli("merge", base, "--adapter", adapter, "-o", tmp_path / "merged", "--type", "F32") == 0
    merged = keye.load(tmp_path / "merged", dtype="float32")
    attached = keye.load(base, dtype="float32", adapters={"tuned": adapter})
    torch.testing.assert_close(engine_log_probs(merged), engine_log_probs(attached, "tuned"), atol=1e-3, rtol=0)
    assert not torch.allclose(engine_log_probs(merged), engine_log_probs(attached), atol=1e-2)


def test_adapters_of_quantised_and_tied_models_are_not_merged(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, targets="head")
    base = tiny_folder(tmp_path / "base")
    assert run_cli("quantize", base, "--to", "int8", "-o", tmp_path / "int8") == 0
    with pytest.raises(KeyeError, match="is quantised: merge the adapter into the original model"):
        merge_adapter(tmp_path / "int8", adapter, tmp_path / "out")
    if model_config_from_dict(tiny_raw()).text.tie_word_embeddings:
        with pytest.raises(KeyeError, match="one weight"):
            merge_adapter(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_average_is_that_of_every_tensor(tmp_path: Path) -> None:
    folders = make_models(tmp_path, 3)
    assert run_cli("merge", *folders, "--weights", "0.5,0.3,0.2", "-o", tmp_path / "out", "--type", "F32") == 0
    states = [load_file(folder / "model.safetensors") for folder in folders]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == states[0].keys()
    for name, tensor in merged.items():
        expected = sum(weight * state[name] for weight, state in zip((0.5, 0.3, 0.2), states, strict=True))
        torch.testing.assert_close(tensor, expected, msg=name)
    assert keye.load(tmp_path / "out").engine.score([IDS])[0].logprobs.isfinite().all()


def test_differences_from_a_base_are_added_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *others = make_models(tmp_path, 3)
    arguments = ("--base", base, "--weights", "0.7,0.6", "-o", tmp_path / "out", "--type", "F32", "--json")
    assert run_cli("merge", *others, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == pytest.approx([0.7, 0.6, -0.3])
    start, first, second = (load_file(folder / "model.safetensors") for folder in (base, *others))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = start[name] + 0.7 * (first[name] - start[name]) + 0.6 * (second[name] - start[name])
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-4)


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def change_configuration(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny_raw() | {"rms_norm_eps": 0.01}))


def drop_tensors(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(change_tokenizer, "other tokenizers"), (change_configuration, "rms_norm_eps"), (drop_tensors, "same tensor")],
)
def test_models_that_differ_are_not_averaged(change: Any, sentence: str, tmp_path: Path) -> None:
    folders = make_models(tmp_path, 2)
    change(folders[1])
    with pytest.raises(MergeError, match=sentence):
        Average(folders)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--weights", "0.5,0.6"), "add up to 1.1"),
        (("--weights", "0.5"), "1 weights were given for 2 models"),
        (("--weights", "half,half"), "write a number for each model"),
        (("--trials", "9"), "--trials is about a search"),
        (("--search", "dev.jsonl", "--weights", "1,0"), "--search finds the weights"),
        (("--adapter", "."), "name that alone"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_models(tmp_path, 2)
    assert run_cli("merge", *folders, *arguments, "-o", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_weights_are_completed_by_a_base() -> None:
    assert complete_weights([0.25, 0.25], 2, has_base=True) == (0.25, 0.25, 0.5)
    with pytest.raises(MergeError, match="between -10 and 10"):
        complete_weights([float("nan"), 1.0], 2, has_base=True)


def score_near(best: tuple[float, ...]) -> Any:
    calls: list[tuple[float, ...]] = []

    def evaluate(weights: tuple[float, ...]) -> float:
        calls.append(weights)
        return -sum((own - other) ** 2 for own, other in zip(weights, best, strict=True))

    evaluate.calls = calls  # type: ignore[attr-defined]
    return evaluate


@pytest.mark.parametrize("best", [(0.6, 0.3, 0.1), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5)])
def test_a_search_comes_close_to_the_best_weights(best: tuple[float, ...]) -> None:
    evaluate = score_near(best)
    trials = search_weights(3, evaluate, trials=60)
    nearest = find_best(trials)
    assert len(trials) <= 60 and len(evaluate.calls) == len(set(evaluate.calls)) == len(trials)
    assert all(abs(sum(trial.weights) - 1) < 1e-9 and min(trial.weights) >= 0 for trial in trials)
    assert max(abs(own - other) for own, other in zip(nearest.weights, best, strict=True)) < 0.06
    assert nearest.score >= max(evaluate(tuple(float(i == j) for j in range(3))) for i in range(3))


def test_a_search_goes_on_where_it_was_interrupted() -> None:
    first = search_weights(2, score_near((0.7, 0.3)), trials=20)
    known = {trial.weights: trial for trial in first[:8]}
    evaluate = score_near((0.7, 0.3))
    assert search_weights(2, evaluate, trials=20, known=known)[:8] == first[:8]
    assert evaluate.calls == [trial.weights for trial in first[8:]]
    with pytest.raises(MergeError, match="give at least 3"):
        search_weights(2, evaluate, trials=2)


@pytest.mark.parametrize("score", ["exact", "loss"])
def test_a_search_by_held_out_conversations(score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = make_models(tmp_path, 2)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in (("what colour is the circle?", "blue"), ("how many squares are there?", "2"))
    ]
    data = tmp_path / "dev.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("merge", *folders, "--search", data, "--score", score, "--trials", 5, "-o", tmp_path / "out")
    assert run_cli(*arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["score"] >= max(trial["score"] for trial in result["trials"][:2])
    lines = (tmp_path / "out" / TRIALS_FILE).read_text().splitlines()
    assert len(lines) == 1 + len(result["trials"]) and json.loads(lines[1])["weights"] == [1.0, 0.0]
    assert keye.load(tmp_path / "out").engine.score([IDS])[0].logprobs.isfinite().all()
    # The same command again takes every trial from the log.
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run_cli(*arguments, "--json", "--overwrite") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["trials"] == result["trials"] and again["weights"] == result["weights"]
