"""A fine-tuning from its questions before training to its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from keye.config import ConfigError
from keye.config.settings import parse_settings, read_toml
from keye.config.toml import to_toml
from keye.process import check_device
from keye.train.checkpoint import FOLDER
from keye.train.finetune.answers import (
    answer_questions,
    choose_questions,
    describe_question,
    load_answers,
    save_answers,
)  # fmt: skip
from keye.train.loop import train
from keye.train.output import CONFIG_FILE, LOG_FILE, check_output
from keye.train.recipes import find_recipe
from keye.train.recipes.family.batches import SKIPPED_FILE
from keye.train.recipes.family.config import FamilyConfig
from keye.train.report import REPORT_FILE, AnsweredSample, read_log, write_report

#: Lines of the file of skipped samples that the report shows.
_MOST_SKIPPED = 100
#: Settings that say how a run is computed and not what is learnt. Stages are compared one by one.
_MAY_DIFFER: Final = frozenset(
    "device threads processes fused checkpointing save_minutes save_steps keep log_seconds peak_flops parallel output "
    "stages".split()
)


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning left: the folder, its report, and the questions with their answers."""

    folder: Path
    report: Path
    answers: tuple[AnsweredSample, ...]
    figures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"output": str(self.folder), "report": str(self.report), "figures": dict(self.figures),
                "samples": [asdict(sample) for sample in self.answers]}  # fmt: skip


def finetune(
    run: FamilyConfig, *, questions: int = 3, resume: bool = True,
    on_report: Callable[[Mapping[str, Any]], object] = lambda _: None,
    on_phase: Callable[[str], object] = lambda _: None,
) -> Outcome:  # fmt: skip
    """Answers questions, trains, answers them again and writes the report. `on_report` gets each record of the log,
    `on_phase` what happens outside training. After an interruption the report shows the run as far as it came."""
    check_device(run.device)
    check_output(run, resume)  # a mistake there is reported before minutes are spent on answers
    if check_same_run(run):
        on_phase("the run has ended before, so nothing more is trained")
    chosen = choose_questions(run, questions) if questions else []
    answers = load_answers(run.output)
    if len(answers) != len(chosen):
        answers = [describe_question(sample) for sample in chosen]
        if chosen:
            on_phase("answering before training")
            before = answer_questions(run, chosen, trained=False)
            answers = [replace(entry, before=text) for entry, text in zip(answers, before, strict=True)]
    is_saved = False

    def report(figures: Mapping[str, Any]) -> None:
        nonlocal is_saved
        if not is_saved:  # the folder belongs to the run from now on
            save_answers(run.output, answers)
            is_saved = True
        on_report(figures)

    try:
        train(run, find_recipe(run.recipe), resume=resume, report=report)
    except KeyboardInterrupt:
        if run.output.exists():
            _write(run, answers)
        raise
    if chosen:
        on_phase("answering after training")
        after = answer_questions(run, chosen, trained=True)
        answers = [replace(entry, after=text) for entry, text in zip(answers, after, strict=True)]
        save_answers(run.output, answers)
    return _write(run, answers)


def check_same_run(run: FamilyConfig) -> bool:
    """Whether the run has ended before. `ConfigError` where the output folder holds a run of other data or with another
    adapter, or one that has ended with other settings: to go on there would learn nothing, or something else."""
    file = run.output / CONFIG_FILE
    if not (run.output / FOLDER).exists() or not file.exists():
        return False
    raw = read_toml(file, "the settings of a run")
    before, now = parse_settings(FamilyConfig, raw, file).model_dump(), run.model_dump()
    begun = {"model", "quant", "lora", "seed", "dtype", "data", "trains", "freezes", "optimizer"}
    has_ended = any((run.output / FOLDER).glob("01-*"))
    differ = [*_differing(before, now), *_differing(before["stages"][0], now["stages"][0])]
    if differ := [name for name in differ if (name not in _MAY_DIFFER if has_ended else name in begun)]:
        what = "that has ended," if has_ended else "that was interrupted,"
        raise ConfigError(f"{run.output} holds a run {what} with another {' and '.join(differ[:3])}; choose another "
                          "output")  # fmt: skip
    return has_ended


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in now if before.get(name) != now[name]]


def _write(run: FamilyConfig, answers: Sequence[AnsweredSample]) -> Outcome:
    (stage,) = run.stages
    log = read_log(run.output / LOG_FILE)
    last: dict[str, Any] = {}
    for record in log:
        last |= {name: value for name, value in record.items() if value is not None}
    what = "an adapter" if run.lora is not None else "all weights"
    facts = {
        "model": run.model, "learnt": what + (f" on {run.quant}" if run.quant else ""),
        "data": ", ".join(entry.path for entry in stage.data),
        **({"measured on": ", ".join(entry.path for entry in stage.val_data)} if stage.val_data else {}),
        "steps": f"{last.get('step', 0):,}", "minutes": last.get("minutes", 0),
        **{name: last[key] for name, key in (("loss", "loss"), ("validation loss", "val_loss")) if key in last},
    }  # fmt: skip
    texts = {"Configuration": to_toml(run)}
    skipped = run.output / SKIPPED_FILE
    if skipped.exists():
        lines = skipped.read_text(encoding="utf-8").splitlines()
        facts["samples left out"] = f"{len(lines):,}"
        texts["Samples left out"] = "\n".join(lines[:_MOST_SKIPPED])
    path = run.output / REPORT_FILE
    write_report(path, f"{run.output.name}: fine-tuned from {run.model.name}", facts, log, answers, texts)
    return Outcome(run.output, path, tuple(answers), last)
