"""The names that people type for settings of fine-tuning, as other trainers have them, and what keye calls them.

The command line takes them as they are; `keye.train.finetune.foreign` reads whole configurations with them. Knows no
values: what a setting may be is said by `keye.train.finetune.settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

#: Settings of keye, and their names in ms-swift, LLaMA-Factory, TRL and transformers that mean the same.
_NAMES: Final[dict[str, str]] = {
    "model": "model_name_or_path model_id_or_path model_id base_model",
    "data": "dataset train_dataset train_data train_file data_path dataset_path",
    "val_data": "val_dataset eval_dataset validation_file",
    "root": "media_dir image_folder video_folder data_root",
    "output": "output_dir",
    "method": "train_type tuner_type sft_type finetuning_type tuning_type",
    "quant": "quant_bits quantization_bit",
    "lora_rank": "lora_r lora_dim",
    "lora_dropout": "lora_dropout_p",
    "rslora": "use_rslora",
    "target_modules": "lora_target_modules lora_target target_module",
    "freeze_vision": "freeze_vit freeze_vision_tower freeze_visual_encoder",
    "freeze_projector": "freeze_aligner freeze_multi_modal_projector freeze_mm_projector freeze_merger",
    "freeze_llm": "freeze_language_model freeze_lm",
    "learning_rate": "lr",
    "vision_lr": "vit_lr vision_tower_lr",
    "projector_lr": "aligner_lr mm_projector_lr merger_lr",
    "optimizer": "optim",
    "lr_schedule": "lr_scheduler_type lr_scheduler",
    "clip": "max_grad_norm",
    "epochs": "num_train_epochs num_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps grad_accum",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length",
    "too_long": "truncation_strategy",
    "max_frames": "fps_max_frames video_maxlen max_num_frames max_video_frames",
    "min_frames": "fps_min_frames",
    "fps": "video_fps",
    "max_pixels": "image_max_pixels",
    "min_pixels": "image_min_pixels",
    "video_total_pixels": "total_pixels",
    "seed": "data_seed",
    "dtype": "torch_dtype",
}
ALIASES: Final = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()}

#: Flags that are on or off, and those that several values may follow.
SWITCHES: Final = frozenset(
    "freeze_vision freeze_projector freeze_llm freeze_indexer lora_experts rslora packing "
    "gradient_checkpointing".split()
)
LISTS: Final = frozenset("data val_data target_modules".split())
#: Values of other trainers that keye calls otherwise.
VALUES: Final[dict[str, dict[str, str]]] = {
    "method": {"qlora": "lora", "sft": "full"},
    "quant": {"4": "int4", "8": "int8"},
    "target_modules": {"all": "all-linear"},
    "optimizer": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"},
    "lr_schedule": {"constant_with_warmup": "constant"},
    "too_long": {"raise": "error", "delete": "drop"},
    "dtype": {"bf16": "bfloat16", "fp32": "float32"},
}
_YES, _NO = frozenset({"true", "yes", "1", "on"}), frozenset({"false", "no", "0", "off"})


def own_name(name: str) -> str:
    """keye's name of a setting, of any spelling: with dashes or underscores, in capitals, or of another trainer."""
    plain = name.lstrip("-").lower().replace("-", "_")
    return ALIASES.get(plain, plain)


def read_switch(text: str) -> bool | None:
    """True or false as people write them; None for anything else."""
    plain = text.lower()
    return True if plain in _YES else False if plain in _NO else None


def rename_flags(arguments: Sequence[str]) -> list[str]:
    """A command line in which flags and values have keye's names: `--freeze_vit false` becomes `--no-freeze-vision`,
    `--dataset a b` becomes `--data a --data b`."""
    renamed: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*renamed, word, *words]
        if not word.startswith("--"):
            renamed.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = own_name(flag)
        if equals:
            words.insert(0, value)
        renamed += _rename(flag, name, words, bool(equals))
    return renamed


def _rename(flag: str, name: str, words: list[str], has_value: bool) -> Iterator[str]:
    """The words of one flag; takes its values off the beginning of `words`."""
    own = "--" + name.removeprefix("video_").replace("_", "-")
    if name in ("load_in_4bit", "load_in_8bit"):
        if _take_switch(words) is not False:
            yield from ("--quant", f"int{name[8]}")
    elif name in SWITCHES:
        yield own if _take_switch(words) is not False else f"--no-{own[2:]}"
    elif name == "resume_from_checkpoint":
        value = words.pop(0) if words and not words[0].startswith("-") else "true"
        yield "--no-resume" if read_switch(value) is False else "--resume"
    elif name in LISTS:
        takes_many = flag != own and not has_value  # as argparse has it; behind keye's own flag, DATA may follow
        while words:
            yield from (own, VALUES.get(name, {}).get(words[0], words[0]))
            words.pop(0)
            if not takes_many or (words and words[0].startswith("-")):
                break
    else:
        yield own
        if words and words[0] in VALUES.get(name, {}):
            yield VALUES[name][words.pop(0)]
        elif has_value:
            yield words.pop(0)


def _take_switch(words: list[str]) -> bool | None:
    value = read_switch(words[0]) if words else None
    if value is not None:
        words.pop(0)
    return value
