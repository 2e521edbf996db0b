"""Configurations of other trainers: every field becomes a setting, or is named with the reason why not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from keye.config import ConfigError
from keye.train.finetune.foreign import read_foreign
from keye.train.finetune.settings import load_settings

SWIFT = r"""#!/bin/bash
# 2 * 45 GB
export CUDA_VISIBLE_DEVICES=0,1
MODEL=Kwai-Keye/Keye-VL-1_5-8B   # the base
nproc_per_node=2
FPS_MAX_FRAMES=64 \
VIDEO_MAX_PIXELS=50176 \
NPROC_PER_NODE=$nproc_per_node \
swift sft \
    --model ${MODEL} \
    --dataset 'train.jsonl#2000' \
              more.jsonl \
    --train_type lora --lora_rank=8 \
    --freeze_vit false --vit_lr 1e-6 \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --learning_rate 1e-4 --warmup_ratio 0.05 --truncation_strategy delete --max_length $LENGTH \
    --output_dir output --attn_impl flash_attn --deepspeed zero2 --mystery 1 --truncation_side left
"""
FACTORY = """
model_name_or_path: Kwai-Keye/Keye-VL-1_5-8B
finetuning_type: lora
lora_rank: 8
lora_target: all
quantization_bit: 4
dataset: clips,talks
dataset_dir: sets
max_samples: 1000
cutoff_len: 4096
template: keye_vl
image_max_pixels: 262144
output_dir: saves
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
plot_loss: true
"""


def test_a_script_of_ms_swift(tmp_path: Path) -> None:
    (tmp_path / "swift.sh").write_text(SWIFT)
    imported = read_foreign(tmp_path / "swift.sh")
    settings = dict(imported.settings)
    assert imported.tool == "ms-swift" and settings["model"] == "Kwai-Keye/Keye-VL-1_5-8B"
    assert settings["data"] == ["train.jsonl#2000", "more.jsonl"]
    assert (settings["lora_rank"], settings["lora_alpha"], settings["gradient_accumulation"]) == (8, 32, 8)
    assert (settings["freeze_vision"], settings["vision_lr"], settings["max_frames"]) == (False, 1e-6, 64)
    assert (settings["too_long"], settings["warmup_ratio"], settings["epochs"]) == ("drop", 0.05, 3)
    skipped = {name: reason for name, _, reason in imported.skipped}
    assert set(skipped) == {"CUDA_VISIBLE_DEVICES", "VIDEO_MAX_PIXELS", "NPROC_PER_NODE", "max_length", "attn_impl",
                            "deepspeed", "mystery", "truncation_side"}  # fmt: skip
    assert "only known when the script runs" in skipped["max_length"] and "torchrun" in skipped["deepspeed"]


def test_a_configuration_of_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(FACTORY)
    imported = read_foreign(tmp_path / "sft.yaml")
    settings = dict(imported.settings)
    assert imported.tool == "LLaMA-Factory" and settings["data"] == [
        "sets/dataset_info.json:clips",
        "sets/dataset_info.json:talks",
    ]
    assert (settings["lora_alpha"], settings["target_modules"], settings["quant"]) == (16, ["all-linear"], "int4")
    assert (settings["max_length"], settings["max_pixels"], settings["batch_size"]) == (4096, 262144, 8)
    assert {name for name, _, _ in imported.skipped} == {"template", "bf16", "resume_from_checkpoint", "plot_loss",
                                                           "max_samples"}  # fmt: skip


def test_a_largest_number_of_samples_repeats_none(tmp_path: Path) -> None:
    for name, rows in (("few", 2), ("many", 1500)):
        (tmp_path / f"{name}.jsonl").write_text('{"query": "a", "response": "b"}\n' * rows)
    (tmp_path / "swift.yaml").write_text("model: x\ndataset: [few.jsonl, many.jsonl]\nmax_samples: 1000\n")
    imported = read_foreign(tmp_path / "swift.yaml")
    assert imported.settings["data"] == ["few.jsonl", "many.jsonl#1000"] and not imported.skipped


def test_variables_that_hold_several_paths_are_several(tmp_path: Path) -> None:
    (tmp_path / "swift.sh").write_text('SETS="a.jsonl b.jsonl#5"\nswift sft --model x --dataset $SETS\n')
    assert read_foreign(tmp_path / "swift.sh").settings["data"] == ["a.jsonl", "b.jsonl#5"]


def test_what_has_no_effect_here_is_left_out_so_that_the_file_is_read(tmp_path: Path) -> None:
    script = "swift sft --model x --dataset a --output_dir o --freeze_vit true --vit_lr 1e-5 --aligner_lr 1e-5"
    (tmp_path / "swift.sh").write_text(f"{script} --eval_steps 9")
    imported = read_foreign(tmp_path / "swift.sh")
    assert {name for name, _, _ in imported.skipped} == {"vision_lr", "projector_lr", "eval_steps"}
    (tmp_path / "tune.toml").write_text(imported.to_toml())
    assert load_settings(tmp_path / "tune.toml", {}).freeze_vision


def test_no_field_is_lost(tmp_path: Path) -> None:
    """Each is a setting of the file that is printed or stands in its comments, and keye finetune reads the file."""
    for name, text in (("swift.sh", SWIFT), ("sft.yaml", FACTORY)):
        (tmp_path / name).write_text(text)
        imported = read_foreign(tmp_path / name)
        printed = imported.to_toml()
        assert all(f"# {field} = " in printed for field, _, _ in imported.skipped)
        (tmp_path / "tune.toml").write_text(printed)
        settings = load_settings(tmp_path / "tune.toml", {})
        assert set(tomllib.loads(printed)) == set(imported.settings) == settings.model_fields_set


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.sh", "echo hello\n", "no command with flags"),
        ("a.sh", "swift sft --model 'x\n", "cannot be split into words"),
        ("a.yaml", "a: [1\n", "not valid YAML"),
        ("a.yaml", "just text\n", "has no fields"),
        ("a.yaml", "b: !!python/object:os.system {}\n", "not valid YAML"),
        ("a.sh", "#" * (1 << 20) + "\n#", "more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_configuration_is_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_foreign(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_foreign(tmp_path / "none.sh")
