"""Settings of a fine-tuning: names that people type, files, and the run that they make."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from keye.config import ConfigError, load_model_config, model_config_from_dict
from keye.config.settings import parse_settings
from keye.config.toml import to_toml
from keye.train.finetune.names import rename_flags
from keye.train.finetune.settings import FinetuneSettings, load_settings, make_run
from keye.train.recipes.family.config import FamilyConfig
from tests.support.tiny import NANO, tiny_raw

NAMES = {"model": "nano", "data": ("a.jsonl", "b.jsonl#50%"), "output": "out"}


def a_run(**names: object) -> FamilyConfig:
    return make_run(load_settings(None, NAMES | names), NANO, load_model_config(NANO))


@pytest.mark.parametrize(
    ("typed", "flags"),
    [
        ("--lora_rank 8 --lora-r=4", "--lora-rank 8 --lora-rank 4"),
        ("--freeze_vit true --freeze_aligner false", "--freeze-vision --no-freeze-projector"),
        ("--freeze-llm a.jsonl", "--freeze-llm a.jsonl"),
        ("--packing=false x", "--no-packing x"),
        ("--dataset a.jsonl b.jsonl#5 --seed 1", "--data a.jsonl --data b.jsonl#5 --seed 1"),
        ("--val-data dev.jsonl a.jsonl", "--val-data dev.jsonl a.jsonl"),
        ("--target_modules q_proj v_proj", "--target-modules q_proj --target-modules v_proj"),
        ("--lora_target all", "--target-modules all-linear"),
        ("--quant_bits 4 --load_in_8bit true --load_in_4bit false", "--quant int4 --quant int8"),
        ("--train_type=lora --torch_dtype bf16", "--method lora --dtype bfloat16"),
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --num_train_epochs 3",
         "--batch-size 2 --gradient-accumulation 8 --epochs 3"),
        ("--vit_lr 1e-6 --aligner_lr 1e-5 --cutoff_len 4096", "--vision-lr 1e-6 --projector-lr 1e-5 --max-length 4096"),
        ("--truncation_strategy delete --lr_scheduler_type constant_with_warmup",
         "--too-long drop --lr-schedule constant"),
        ("--resume_from_checkpoint out/checkpoints/3 --total_pixels 5", "--resume --total-pixels 5"),
        ("-o out -- --dataset", "-o out -- --dataset"),
    ],
)  # fmt: skip
def test_flags_of_other_trainers_are_those_of_keye(typed: str, flags: str) -> None:
    assert rename_flags(typed.split()) == flags.split()


def test_a_run_is_a_file_of_keye_train(tmp_path: Path) -> None:
    run = a_run(lora_rank=8, max_frames=32, val_data=("dev.jsonl",), weights=[2.0, 1.0], eval_steps=5)
    raw = tomllib.loads(to_toml(run))
    assert parse_settings(FamilyConfig, raw, tmp_path) == run
    (stage,) = raw["stage"]
    assert [(Path(each["path"]).name, each["weight"]) for each in stage["data"]] == [("a.jsonl", 2), ("b.jsonl#50%", 1)]
    assert (stage["media"], stage["eval_steps"], raw["lora"]["rank"]) == ({"max_frames": 32}, 5, 8)


def test_an_adapter_leaves_vision_and_indexer_alone() -> None:
    run = a_run()
    (stage,) = run.stages
    assert run.lora is not None and run.lora.targets == ("all-linear",)
    assert not run.lora.experts and run.lora.exclude == ("tower", "projector", "indexer")
    assert (stage.trained_parts, stage.frozen_parts, stage.attention) == (("decoder",), ("indexer",), "sparse")
    assert (stage.lr, stage.indexer_kl, stage.epochs, stage.steps) == (1e-4, 0, 1, None)


def test_parts_are_freed_and_frozen_one_by_one() -> None:
    run = a_run(freeze_vision=False, freeze_llm=True, freeze_indexer=False, max_steps=9, vision_lr=1e-6)
    (stage,) = run.stages
    assert run.lora is not None and run.lora.targets == ("tower", "indexer") and not run.lora.experts
    assert (stage.trained_parts, stage.frozen_parts) == (("tower", "indexer"), ())
    assert (stage.steps, stage.epochs, stage.vision_lr, stage.indexer_kl) == (9, None, 1e-6, 1)


def test_all_weights_of_a_dense_model() -> None:
    raw = tiny_raw() | {"num_experts": 0, "architectures": ["KeyeVL1_5ForConditionalGeneration"]}
    raw.pop("sa_config")
    settings = load_settings(None, NAMES | {"method": "full", "freeze_projector": False, "lr_schedule": "constant"})
    run = make_run(settings, NANO, model_config_from_dict(raw))
    (stage,) = run.stages
    assert run.lora is None and stage.attention == "dense" and stage.frozen_parts == ()
    assert stage.trained_parts == ("decoder", "projector") and stage.lr == 1e-5
    assert stage.lr_factor(20, 0.99) == 1
    with pytest.raises(ConfigError, match="has no indexer, which freeze_indexer = false would teach; leave it out"):
        make_run(load_settings(None, NAMES | {"freeze_indexer": False}), NANO, model_config_from_dict(raw))


def test_learning_rates_rise_over_a_share_of_the_run() -> None:
    (stage,) = a_run(warmup_steps=0, warmup_ratio=0.2, lr_schedule="constant").stages
    assert [stage.lr_factor(step, step / 100) for step in (0, 10, 20, 90)] == [0, 0.5, 1, 1]


def test_a_pack_fits_the_context() -> None:
    context = load_model_config(NANO).text.max_position_embeddings
    assert a_run().stages[0].max_tokens == min(8192, context)
    with pytest.raises(ConfigError, match=f"max_length is 999,999, and the model's context holds {context:,}"):
        a_run(max_length=999_999)


def test_a_step_has_as_many_packs_as_all_processes_compute() -> None:
    run = a_run(batch_size=2, gradient_accumulation=4, processes=2)
    assert run.stages[0].batch == 16


def test_a_file_has_paths_of_its_own_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "tune.toml").write_text('model = "nano"\ndata = ["a.jsonl"]\noutput = "out"\nlora_rank = 4\nseed = 3\n')
    settings = load_settings(tmp_path / "tune.toml", {"lora_rank": 2})
    assert (settings.model, settings.data, settings.output) == ("nano", (f"{tmp_path}/a.jsonl",), tmp_path / "out")
    assert (settings.lora_rank, settings.seed) == (2, 3)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"data": ()}, "name the data, as in: keye finetune 1.5 train.jsonl -o captions"),
        ({"output": None}, "name the folder to write with -o"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"lora_rnk": 1}, "unknown key lora_rnk; did you mean lora_rank"),
        ({"weights": [1.0]}, "weights has 1 numbers for 2 data sets"),
        ({"method": "full", "quant": "int4"}, 'quant = "int4" leaves numbers that cannot be trained'),
        ({"freeze_llm": True}, "every part is frozen"),
        ({"vision_lr": 1e-5}, "vision_lr has no effect on a frozen part; set freeze_vision = false"),
        ({"lora_experts": True, "freeze_llm": True, "freeze_vision": False}, "leave one of the two out"),
        ({"eval_steps": 4}, "eval_steps needs val_data"),
        ({"fps": 1.0, "nframes": 4}, "nframes and fps exclude each other"),
    ],
)
def test_mistakes_are_one_sentence(names: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(None, NAMES | names)
    assert "\n" not in str(caught.value)


def test_a_file_of_keye_train_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('recipe = "family"\n')
    with pytest.raises(ConfigError, match="is a file of keye train: run keye train"):
        load_settings(tmp_path / "run.toml", {})


def test_every_setting_has_a_flag() -> None:
    from keye.commands.finetune import finetune

    assert set(FinetuneSettings.model_fields) <= {parameter.name for parameter in finetune.params}
