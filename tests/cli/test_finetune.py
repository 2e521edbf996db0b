"""`keye finetune`: the run that flags make, files of other trainers, the check, and mistakes in one sentence."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROWS = [{"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(6)]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_flags_of_other_trainers_make_a_file_of_keye_train(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    flags = "--lora_rank 4 --freeze_vit false --num_train_epochs 2 --print-config --dataset a.jsonl b.jsonl"
    result = run("finetune", "--model", model_folder, "--output_dir", tmp_path / "out", *flags.split())
    raw = tomllib.loads(result.out)
    assert (result.code, raw["model"], raw["lora"]["rank"]) == (0, str(model_folder), 4)
    (stage,) = raw["stage"]
    assert [Path(entry["path"]).name for entry in stage["data"]] == ["a.jsonl", "b.jsonl"]
    assert (stage["epochs"], stage["trains"]) == (2, ["decoder", "tower"])


def test_a_file_of_another_trainer_becomes_one_of_keye(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    script = f"swift sft --model {model_folder} --dataset a.jsonl --output_dir out --lora_rank 2 --attn_impl sdpa"
    (tmp_path / "swift.sh").write_text(script)
    printed = run("finetune", "--from", tmp_path / "swift.sh")
    assert printed.code == 0 and "# attn_impl = 'sdpa': keye chooses its kernels itself" in printed.out
    (tmp_path / "tune.toml").write_text(printed.out)
    raw = tomllib.loads(run("finetune", "--config", tmp_path / "tune.toml", "--seed", 5, "--print-config").out)
    assert (raw["seed"], raw["lora"]["rank"], raw["stage"][0]["data"][0]["path"]) == (5, 2, f"{tmp_path}/a.jsonl")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "name a model, as in: keye finetune 1.5 train.jsonl -o captions"),
        (("MODEL", "DATA"), "name the folder to write with -o"),
        (("MODEL", "-o", "out"), "name the data"),
        (("MODEL", "DATA", "-o", "out", "--lora_rank", "0"), "--lora-rank"),
        (("MODEL", "DATA", "-o", "out", "--weights", "a,b"), "--weights has 'a', which is not a number"),
        (("MODEL", "DATA", "-o", "out", "--columns", "messages"), "--columns messages names no column"),
        (("MODEL", "DATA", "-o", "out", "--freeze-llm"), "every part is frozen"),
        (("MODEL", "DATA", "-o", "out", "--attn_impl", "sdpa"), "No such option"),
        (("--from", "none.sh"), "none.sh cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Callable, model_folder: Path, data: Path, words: tuple[str, ...], sentence: str
) -> None:
    places = {"MODEL": model_folder, "DATA": data}
    result = run("finetune", *(places.get(word, word) for word in words))
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("keye: ") and sentence in result.err
