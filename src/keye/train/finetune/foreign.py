"""Configurations of ms-swift (.sh, .yaml) and LLaMA-Factory (.yaml) as settings of `keye finetune`.

Every field of them becomes a setting or is named with the reason why not. Nothing in a script is executed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import add, floordiv, mul, sub
from pathlib import Path
from typing import Any, Final, get_args

import yaml

from keye.config import ConfigError
from keye.config.toml import to_toml
from keye.data.sources import DataSet, open_set
from keye.errors import KeyeError, brief
from keye.train.finetune.names import LISTS, SWITCHES, VALUES, own_name, read_switch
from keye.train.finetune.settings import MEDIA, FinetuneSettings

#: Larger files are not read: no configuration has as many bytes.
MAX_BYTES: Final = 1 << 20
#: What a setting means in each tool where its file says nothing.
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "ms-swift": {"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.05, "epochs": 3.0, "packing": False,
                 "weight_decay": 0.1, "warmup_steps": 0, "warmup_ratio": 0.05, "save_steps": 500, "seed": 42},
    "LLaMA-Factory": {"lora_rank": 8, "learning_rate": 5e-5, "epochs": 3.0, "max_length": 2048, "packing": False,
                      "batch_size": 8, "lr_schedule": "linear", "warmup_steps": 0, "save_steps": 500, "seed": 42},
}  # fmt: skip
_RUNS_BY_LOOP = "keye's loop always does this in its own way"
_OTHER_LIBRARY = "a setting of a library that keye does not use"
_NOT_LORA = "another kind of adapter than plain LoRA"
#: Fields without a setting of keye, by a pattern of their names, and why.
REASONS: Final = {
    "model_type|template|agent_template|model_name|model_author|model_revision|trust_remote_code|use_hf|use_.*hub":
        "the folder of the model says it",
    "stage|do_train|do_eval|task_type|task|rlhf_type": "keye finetune learns replies, as their sft does",
    "deepspeed.*|fsdp.*|ddp_.*|sequence_parallel_size|tensor_.*parallel.*|pipeline_.*|expert_.*parallel.*|"
    "context_parallel.*|nproc_per_node|nnodes|node_rank|master_.*":
        "several devices: torchrun -m keye train, with [parallel] in the file of --print-config",
    "cuda_visible_devices|device_map|local_rank": "devices are named by --device",
    "attn_impl|flash_attn|use_liger.*|enable_liger.*|padding_free|neat_packing|use_unsloth|use_cache|"
    "use_logits_to_keep|disable_gradient_checkpointing_vit|vit_gradient_checkpointing":
        "keye chooses its kernels itself",
    "bnb_.*|quant_method|quantization_method|quantization_type|double_quantization|hqq_.*":
        "keye has number formats of its own, in groups of 64 or by row (docs/quantisation.md)",
    "use_dora|loraplus.*|lora_bias|init_weights|init_lora_weights|pissa.*|lora_ga.*|adalora.*|galore.*|"
    "use_galore|lorap.*|lora_modules|modules_to_save|additional_target|lora_dtype": _NOT_LORA,
    "target_regex|target_parameters|lora_target_parameters": "targets are named by target_modules and lora_experts",
    "freeze_parameters.*|trainable_parameters.*|freeze_trainable.*|freeze_extra.*":
        "patterns of parameters: trains and freezes in the file of --print-config",
    "dataset_num_proc|preprocessing_num_workers|dataloader.*|overwrite_cache|load_from_cache_file|lazy_tokenize|"
    "streaming|buffer_size|tokenized_path|cache_dir|dataset_shuffle|shuffle_buffer_size|train_dataloader_shuffle|"
    "group_by_length|remove_unused_columns": "samples are read, laid out and shuffled while training runs",
    "split_dataset_ratio|val_size|val_dataset_shuffle|val_dataset_sample|eval_dataset_size":
        "data that is measured stands in a file of its own, val_data; path#N takes so many samples",
    "per_device_eval_batch_size|eval_strategy|evaluation_strategy|eval_on_.*|do_predict|predict.*|"
    "metric.*|load_best_model_at_end|greater_is_better|compute_accuracy|eval_accumulation_steps":
        "the loss of val_data is measured every eval_steps",
    "logging_.*|report_to|run_name|plot_loss|include_num_input.*|log_.*|swanlab.*|wandb.*|disable_tqdm":
        "log.jsonl and report.html are always written",
    "save_strategy|save_only_model|save_safetensors|overwrite_output_dir|add_version|create_checkpoint_symlink|"
    "push_to_hub|hub_.*|export_.*": "keye writes checkpoints that can be resumed, and an adapter in PEFT's layout",
    "adam_.*|adafactor|optim_.*|use_muon|use_badam|badam.*|apollo.*|use_apollo|use_adam_mini": _OTHER_LIBRARY,
    "lr_scheduler_kwargs|cosine_.*|min_lr|lr_decay_.*": "schedules end at 0: cosine, linear or constant",
    "neftune.*|loss_scale|loss_type|train_on_prompt|mask_history|label_smoothing.*|dft_alpha|"
    "router_aux_loss_coef|moe_aux.*": "the loss is that of all replies; a message with \"learn\": false is left out",
    "fp16|pure_bf16|upcast.*|half_.*|tf32": "weights are bfloat16 or float32, with float32 copies in the optimizer",
    "system|default_system|enable_thinking|thinking_prefix|add_non_thinking_prefix|reasoning_effort|tool_format|"
    "response_prefix": "a system message or a mode belongs into the samples (docs/data-formats.md)",
    "ref_.*|reward.*|pref_.*|beta|num_generations|vllm_.*|infer_.*": "of reinforcement learning or inference",
    "rope_scaling|max_model_len|resize_vocab|new_special_tokens|shift_attn": "changes of the model: keye train",
    "pytorch_.*|nccl_.*|omp_.*|hf_.*|modelscope_.*|tokenizers_parallelism|disable_version_check|force_torchrun|"
    "swift_.*|use_audio_in_video|enable_audio.*|torchdynamo.*|wandb_.*|path|pythonpath|ld_library_path": _OTHER_LIBRARY,
    "video_max_pixels|video_min_pixels":
        "images and frames share a limit, max_pixels; a sample may set its own (docs/data-formats.md)",
    "video_max_token_num|image_max_token_num|video_min_token_num|image_min_token_num":
        "counted in pixels here: max_pixels is tokens x 784 (28 x 28), for 2.0 the same",
    "tuner_backend|strict|truncation|check_model|custom_.*|external_plugins|ignore_args_error|ddp.*": _RUNS_BY_LOOP,
}  # fmt: skip
_UNKNOWN = "keye finetune has no setting for it"
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
#: A number that a script computes of two: $(expr 16 / 4), $((16 / 4)).
_COMPUTED = re.compile(r"\$\((?:expr\s|\()\s*[^\s()]+\s*\\?[-+*/]\s*[^\s()]+\s*\)?\)")
_PRODUCT = re.compile(r"\$\((?:expr\s|\()\s*(\d+)\s*\\?([-+*/])\s*(\d+)\s*\)?\)")
_OPERATIONS: Final[dict[str, Callable[[int, int], int]]] = {"+": add, "-": sub, "*": mul, "/": floordiv}
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-[^}]*)?\}|(\w+))")


@dataclass(frozen=True)
class Imported:
    """A configuration of another trainer. `settings` are those of `keye finetune`; `skipped` are its other fields with
    their values, and why each is left out."""

    tool: str
    source: str
    settings: Mapping[str, Any]
    skipped: tuple[tuple[str, Any, str], ...]

    def to_toml(self) -> str:
        """A file for `keye finetune --config`; what was skipped as comments."""
        lines = [f"# {self.source} ({self.tool}) for keye finetune --config; paths are relative to this file"]
        text = to_toml(self.settings)
        if self.skipped:
            lines += ["#", "# Left out:"]
            lines += [f"# {name} = {brief(value)}: {reason}".replace("\n", " ") for name, value, reason in self.skipped]
        missing = [name for name in ("model", "data", "output") if name not in self.settings]
        lines += [f"# {name} is missing: add it" for name in missing]
        return "\n".join(lines) + "\n\n" + text


def read_foreign(path: Path) -> Imported:
    """Reads a script or configuration; `ConfigError` where it is neither."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes, which no configuration has")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give a script of ms-swift or a .yaml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8: give a script of ms-swift or a .yaml") from None
    is_yaml = path.suffix.lower() in (".yaml", ".yml", ".json")
    fields = _read_yaml(path, text) if is_yaml else _read_script(path, text)
    names = {name.lower() for name, _ in fields}
    is_factory = bool(names & {"finetuning_type", "cutoff_len", "dataset_dir", "lora_target"})
    tool = "LLaMA-Factory" if is_factory else "ms-swift"
    return _convert(tool, path, fields)


def _read_yaml(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path} has no fields: give a configuration of ms-swift or LLaMA-Factory")
    return [(str(name), value) for name, value in raw.items()]


def _read_script(path: Path, text: str) -> list[tuple[str, Any]]:
    """Environment and flags of the first command of a script that trains; variables that it sets are filled in."""
    text = _COMPUTED.sub(lambda match: shlex.quote(match[0]), text.replace("\\\r\n", " ").replace("\\\n", " "))
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
        lexer.whitespace, lexer.whitespace_split = " \t\r", True
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be split into words ({error}): give a script of a shell or a .yaml") from None
    variables, command = dict[str, str](), list[str]()
    for line in _lines(words):
        flags = _take_assignments(line, variables)
        if any(word.startswith("--") for word in flags):
            command = flags
            break
    if not command:
        raise ConfigError(f"{path} has no command with flags such as --model: give a script of ms-swift or a .yaml")
    fields: list[tuple[str, Any]] = [(name, value) for name, value in variables.items() if name.isupper()]
    used = {name for word in command for pair in _VARIABLE.findall(word) for name in pair if name}
    fields = [(name, value) for name, value in fields if name not in used]
    return fields + _flags([part for word in command for part in _fill_parts(word, variables)])


def _lines(words: Iterable[str]) -> Iterable[list[str]]:
    line: list[str] = []
    for word in words:
        if set(word) <= set(";&|\n"):
            yield line
            line = []
        else:
            line.append(word)
    yield line


def _take_assignments(line: list[str], variables: dict[str, str]) -> list[str]:
    """Adds the assignments that a line begins with to `variables`; returns the words behind them."""
    for place, word in enumerate(line):
        if word == "export":
            continue
        match = _ASSIGNMENT.fullmatch(word)
        if match is None:
            return line[place:]
        variables[match[1]] = _fill(match[2], variables)
    return []


def _fill(word: str, variables: Mapping[str, str]) -> str:
    """A word with the values of variables and numbers computed of them, as far as the script says them."""
    word = _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)
    if (match := _PRODUCT.fullmatch(word)) and not (match[2] == "/" and int(match[3]) == 0):
        return str(_OPERATIONS[match[2]](int(match[1]), int(match[3])))
    return word


def _fill_parts(word: str, variables: Mapping[str, str]) -> list[str]:
    """The words that a shell makes of a word: a variable that holds several paths or names is several."""
    filled = _fill(word, variables)
    return filled.split() if _VARIABLE.fullmatch(word) else [filled]


def _flags(words: list[str]) -> list[tuple[str, Any]]:
    """Flags and what follows each: a text, several, or nothing, which is true."""
    fields: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            fields.append((flag, [value] if equals else []))
        elif fields:
            fields[-1][1].append(word)
    return [(flag, values[0] if len(values) == 1 else values or "true") for flag, values in fields]


def _convert(tool: str, path: Path, fields: list[tuple[str, Any]]) -> Imported:
    settings: dict[str, Any] = {}
    skipped: list[tuple[str, Any, str]] = []
    for name, value in fields:
        own = own_name(name)
        if own in FinetuneSettings.model_fields:
            try:
                converted = _read_value(own, value)
            except ValueError as error:
                skipped.append((name, value, str(error)))
                continue
            if own in settings and own in MEDIA and settings[own] != converted:
                skipped.append((name, value, f"keye has {own} for images and frames alike, set above"))
            else:
                settings[own] = converted
        elif own in ("load_in_4bit", "load_in_8bit"):
            settings |= {"quant": f"int{own[8]}"} if read_switch(str(value)) else {}
        elif own in ("resume_from_checkpoint", "bf16"):
            reason = "keye finetune run again resumes" if own[0] == "r" else "dtype is bfloat16 unless set"
            skipped.append((name, value, reason))
        else:
            skipped.append((name, value, find_reason(own) or _UNKNOWN))
    _finish(settings, skipped)
    if tool == "LLaMA-Factory":
        _name_sets(settings, skipped)
    _limit_sets(settings, skipped, path.parent)
    for name, value in DEFAULTS[tool].items():
        settings.setdefault(name, value)
    if tool == "LLaMA-Factory":
        settings.setdefault("lora_alpha", 2.0 * settings["lora_rank"])
    order = [name for name in FinetuneSettings.model_fields if name in settings]
    return Imported(tool, path.name, {name: settings[name] for name in order}, tuple(skipped))


def find_reason(name: str) -> str | None:
    """Why a field of another trainer has no setting; None for one that is not known."""
    return next((reason for pattern, reason in REASONS.items() if re.fullmatch(pattern, name)), None)


def _read_value(name: str, value: Any) -> Any:
    """A value as the setting takes it; `ValueError` with a sentence where it takes none like it."""
    if isinstance(value, str) and (_VARIABLE.search(value) or "$(" in value or "`" in value):
        raise ValueError("its value is only known when the script runs")
    if name in SWITCHES:
        if (switch := value if isinstance(value, bool) else read_switch(str(value))) is None:
            raise ValueError("it must be true or false")
        return switch
    if name in LISTS:
        texts = [str(entry) for entry in value] if isinstance(value, list) else str(value).split(",")
        return [VALUES.get(name, {}).get(text.strip(), text.strip()) for text in texts if text.strip()]
    if isinstance(value, list | dict):
        raise ValueError(f"{name} takes one value")
    text = VALUES.get(name, {}).get(str(value), str(value))
    kinds = _kinds(name)
    for kind in kinds & {int, float}:
        try:
            number = float(text)
        except ValueError:
            continue
        if kind is float or number == int(number):
            return kind(number)
    if choices := {choice for choice in kinds if isinstance(choice, str)}:
        if text not in choices:
            raise ValueError(f"{name} takes {', '.join(sorted(choices))}")
        return text
    if kinds & {int, float}:
        raise ValueError(f"{name} takes a number")
    return text


def _kinds(name: str) -> set[Any]:
    """The types, and the choices, of a setting."""
    kinds: set[Any] = set()
    waiting = [FinetuneSettings.model_fields[name].annotation]
    while waiting:
        kind = waiting.pop()
        inner = get_args(kind)
        waiting += inner
        kinds |= set() if inner else {kind}
    return kinds


def _name_sets(settings: dict[str, Any], skipped: list[tuple[str, Any, str]]) -> None:
    """Data sets by their names in a dataset_info.json, in the folder that the file names or in data."""
    folder = "data"
    for place, (name, value, _) in enumerate(skipped):
        if name == "dataset_dir" and isinstance(value, str):
            folder = value
            del skipped[place]
            break
    for name in ("data", "val_data"):
        if name in settings:
            settings[name] = [f"{folder}/dataset_info.json:{entry}" for entry in settings[name]]


def _limit_sets(settings: dict[str, Any], skipped: list[tuple[str, Any, str]], folder: Path) -> None:
    """`max_samples` rows of the sets that have more; of one with fewer they would come more than once."""
    for place, (name, value, _) in enumerate(skipped):
        if name != "max_samples" or not str(value).isdigit():
            continue
        counts = {entry: _count_rows(folder, entry) for entry in settings.get("data", ()) if "#" not in entry}
        settings["data"] = [
            f"{entry}#{value}" if (counts.get(entry) or 0) > int(value) else entry for entry in settings.get("data", ())
        ]
        unread = ", ".join(entry for entry, count in counts.items() if count is None)
        reason = f"add #{value} to {unread} if there are more rows: it cannot be read from here"
        skipped[place : place + 1] = [(name, value, reason)] if unread else []
        return


def _count_rows(folder: Path, entry: str) -> int | None:
    """Rows of a set; None where it cannot be read."""
    with suppress(KeyeError):
        return open_set(DataSet.parse(str(folder / entry))).count
    return None


def _finish(settings: dict[str, Any], skipped: list[tuple[str, Any, str]]) -> None:
    """What depends on several fields, and numbers by which nothing is set."""
    frozen = {"vision_lr": "freeze_vision", "projector_lr": "freeze_projector"}
    for name in [name for name, switch in frozen.items() if name in settings and settings.get(switch, True)]:
        skipped.append((name, settings.pop(name), f"{frozen[name]} = true leaves it without effect"))
    if "eval_steps" in settings and not settings.get("val_data"):
        skipped.append(("eval_steps", settings.pop("eval_steps"), "val_data is missing, which it measures"))
    for name in ("max_steps", "save_total_limit", "max_length"):
        if name in settings and settings[name] <= 0:
            skipped.append((name, settings.pop(name), "nothing is set by it"))
