"""`keye finetune`: the run that flags make, files of other trainers, the check, and mistakes in one sentence."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import keye

#: In words that keye-nano knows: an adapter that leaves the head alone cannot choose among its unused tokens.
TALKS = [
    ("what color is the circle?", "green"),
    ("what color is the square?", "red"),
    ("what color is it?", "purple"),
    ("what color is the triangle?", "blue"),
    ("what color is the star?", "yellow"),
    ("what shape is it?", "star"),
]
ROWS = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
        for question, reply in TALKS]  # fmt: skip


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


@pytest.mark.slow
def test_an_adapter_of_nano_answers_as_the_data_do(run: Callable, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = run("finetune", "nano", data, "-o", out, "--max-length", 512, "--learning-rate", 0.003, "--max-steps", 60,
                 "--warmup-steps", 2, "--val-data", data, "--eval-steps", 30)  # fmt: skip
    assert result.code == 0 and f"--adapter {out}" in result.out and "keye merge nano" in result.out
    assert "attention adapted: 24 of 24 layers" in result.err and "loss" in result.err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["val_loss"] for record in log if "val_loss" in record][-1] < 0.05
    answers = json.loads((out / "answers.json").read_text())
    assert [entry["after"] for entry in answers] == [entry["expected"] for entry in answers]
    assert all(entry["before"] != entry["expected"] for entry in answers)
    html = (out / "report.html").read_text()
    assert html.count("<figure>") >= 4 and answers[0]["expected"] in html
    model = keye.load(adapters={"tuned": out})
    replies = [model.chat(row["messages"][:1], temperature=0, max_tokens=16, adapter="tuned").text for row in ROWS]
    assert replies == [row["messages"][1]["content"] for row in ROWS]


def test_the_check_says_what_a_run_would_do(
    run: Callable, model_folder: Path, data: Path, video: Path, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "<video>when?"}, {"role": "assistant", "content": "[[1.0, 2.0]]"}]}
    with data.open("a") as file:
        file.write(json.dumps(row | {"videos": [str(video)]}) + "\n")
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700, "--check"]
    result = run(*words)
    assert result.code == 0 and not (tmp_path / "out").exists()
    assert "7 rows, 1 medium opened: no faults" in result.out and "7 laid out" in result.out
    assert "0 differ" in result.out and "attention adapted  8 of 8 layers" in result.out
    assert "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}[[1.0, 2.0]]<|im_end|>" in result.out
    assert "memory" in result.out and "for 1 pack in 1 step" in result.out
    result = run(*words, "--json").data
    assert result["times"] == {"compared": 8, "different": 0, "faults": [], "without": 0}
    assert (result["data"]["rows"], result["problems"]) == (7, []) and result["cost"]["steps"] == 1
    assert next(part for part in result["parts"] if part["part"] == "tower")["adapted"] == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--target-modules", "o_projj"), "o_projj"),
        (("--batch-size", "999", "--max-steps", "1"), "a step of 999 packs takes all 6 rows"),
        (("--max-length", "12"), "tokens, 0 of them visual, but"),
    ],
)
def test_a_problem_ends_the_check_and_the_run(
    run: Callable, model_folder: Path, data: Path, tmp_path: Path, flags: tuple[str, ...], sentence: str
) -> None:
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700, *flags]
    checked = run(*words, "--check")
    assert checked.code == 1 and "problem: " in checked.out and sentence in checked.out
    started = run(*words)
    assert started.code == 2 and sentence in started.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("media", ["10", "all"])
def test_a_long_sample_far_back_is_found_before_the_run(
    run: Callable, model_folder: Path, data: Path, tmp_path: Path, media: str
) -> None:
    rows = [json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]})
            for text in ("b", "b" * 2000)]  # fmt: skip
    data.write_text("\n".join([rows[0]] * 300 + [rows[1]]))
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700]
    checked = run(*words, "--check", "--check-media", media, "--json")
    assert checked.code == 1 and f"{data}:301: the sample takes" in checked.data["problems"][0]
    assert checked.data["samples"] == (301 if media == "all" else 200)
    started = run(*words)
    assert started.code == 2 and f"{data}:301: the sample takes" in started.err
    dropped = run(*words, "--too-long", "drop", "--check", "--check-media", media, "--json").data
    assert dropped["problems"] == []


def test_planted_faults_are_named_with_their_lines(
    run: Callable, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    text = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a"}]
    faults = [{"messages": text, "images": ["none.png"]}, {"messages": []},
              {"messages": [{"role": "teacher", "content": "x"}, {"role": "assistant", "content": "y"}]}]  # fmt: skip
    with data.open("a") as file:
        file.write("".join(json.dumps(fault) + "\n" for fault in faults) + '{"messages": [\n')
    result = run("finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700, "--check", "--json")
    assert result.code == 1
    assert [fault.split(": ")[0] for fault in result.data["data"]["faults"]] == [f"{data}:{n}" for n in (7, 8, 9, 10)]


def test_data_without_a_good_row_is_a_problem(run: Callable, model_folder: Path, data: Path, tmp_path: Path) -> None:
    data.write_text('{"messages": []}\n' * 3)
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700]
    checked = run(*words, "--check")
    assert checked.code == 1 and "problem: none of the 3 rows can be learnt from" in checked.out
    assert all(f"{data}:{line}: " in checked.out for line in (1, 2, 3))
    assert run(*words).code == 2


def test_more_bad_rows_than_a_run_bears_are_all_listed_and_end_it_before(
    run: Callable, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"messages": []}\n' * 11)
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700]
    checked = run(*words, "--check", "--json")
    assert checked.code == 1
    assert [fault.split(": ")[0] for fault in checked.data["data"]["faults"]] == [f"{data}:{n}" for n in range(7, 18)]
    assert "11 of 17 rows cannot be learnt from, more than 1%" in checked.data["problems"][0]
    started = run(*words)
    assert started.code == 2 and "11 of 17 rows cannot be learnt from" in started.err


def test_samples_longer_than_the_selection_are_a_warning(
    run: Callable, own_model: Path, data: Path, tmp_path: Path
) -> None:
    raw = json.loads((own_model / "config.json").read_text())
    raw["sa_config"]["topk"] = 8
    (own_model / "config.json").write_text(json.dumps(raw))
    words = ["finetune", own_model, data, "-o", tmp_path / "out", "--check", "--max-length", 700]
    assert "6 of 6 samples have more than the 8 keys" in run(*words).out
    assert "while the indexer is frozen" not in run(*words, "--no-freeze-indexer").out


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
        (
            ("MODEL", "DATA", "-o", "out", "--attn_impl", "sdpa"),
            "leave --attn-impl out: keye chooses its kernels itself. See keye finetune -h.",
        ),
        (("MODEL", "DATA", "-o", "out", "--lora_rnak", "4"), "--lora-rank"),
        (("MODEL", "DATA", "-o", "out", "--lora-rank", "5000"), "lora_rank is 5000; it must be at most 4096"),
        (("MODEL", "DATA", "-o", "out", "--seed", str(2**63)), "seed is 9223372036854775808; it must be below"),
        (("MODEL", "DATA", "-o", "out", "--max-frames", "2", "--min-frames", "9"), "min_frames is 9 and max_frames is"),
        (("MODEL", "DATA", "-o", "out", "--device", "qpu"), "device 'qpu' cannot be used here"),
        (("MODEL", "DATA", "-o", "out", "--device", "qpu", "--check"), "device 'qpu' cannot be used here"),
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


@pytest.mark.parametrize(
    ("checkpoint", "flags", "sentence"),
    [
        ("01-00000000", ("--epochs", "3"), "that has ended, with another epochs; choose another output"),
        ("01-00000000", ("--lora-rank", "4"), "that has ended, with another lora; choose another output"),
        ("00-00000002", ("--data", "DATA"), "that was interrupted, with another data; choose another output"),
        ("00-00000002", ("--no-freeze-vision",), "that was interrupted, with another lora and trains; choose"),
    ],
)
def test_a_folder_of_another_run_is_not_taken_for_this_one(
    run: Callable,
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    checkpoint: str,
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    words = ["finetune", model_folder, data, "-o", tmp_path / "out", "--max-length", 700]
    (tmp_path / "out/checkpoints" / checkpoint).mkdir(parents=True)
    config = tmp_path / "out/config.toml"
    config.write_text(run(*words, "--print-config").out)
    before = config.read_bytes()
    result = run(*words, *(data if flag == "DATA" else flag for flag in flags))
    assert result.code == 2 and sentence in result.err and config.read_bytes() == before


def test_a_folder_of_others_is_kept_and_nothing_is_computed_before(
    run: Callable, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine")
    result = run("finetune", model_folder, data, "-o", out, "--max-length", 700)
    assert result.code == 2 and "holds a model that no run made" in result.err and "answering" not in result.err
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
