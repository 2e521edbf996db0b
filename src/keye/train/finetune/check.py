"""What is known of a fine-tuning before anything is trained: the faults of its data, what samples become, which layers
change, and what memory and time it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, Final

import torch

from keye.cache.slabs import free_memory
from keye.config import KeyeConfig, load_generation_config, load_model_config
from keye.data.check import DataCheck, Progress, check_sets
from keye.data.samples import Sample
from keye.data.sources import MAX_BAD, are_too_many
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.process import check_device
from keye.sessions.search.questions import ground_question
from keye.train.finetune.measure import MOST_SAMPLES, MOST_SECONDS, Measured, measure
from keye.train.layout import Layout, LengthError
from keye.train.lora import GROUPS, LoraError, LoraParameters
from keye.train.parts import choose_parameters, is_in_part
from keye.train.plan import TrainPlan, measure_rate, plan_training
from keye.train.recipes.family.batches import data_set, open_stream, prepare
from keye.train.recipes.family.config import FamilyConfig, FamilyStage
from keye.units import format_bytes, plural

#: Rows whose media are opened where not all are.
MEDIA_ROWS: Final = 200
#: Samples that are put into packs one by one to predict a run; longer runs are as many times that.
_MOST_COUNTED: Final = 200_000
#: Passes over the data that one step may take.
_MOST_PASSES: Final = 100


@dataclass(frozen=True)
class PartCount:
    """How much of a part of the model is trained: `adapted` of its `layers`, with so many `numbers` that change."""

    part: str
    adapted: int
    layers: int
    numbers: int


@dataclass(frozen=True)
class Cost:
    """What the run takes: `memory` bytes by purpose, `free` bytes of the device, `packs` and `steps` in all, `seconds`
    at the rate that this machine was measured at."""

    memory: dict[str, int]
    free: int | None
    packs: int
    steps: int
    seconds: float

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Check:
    """The result. `problems` would end or spoil a run, which is not begun then; `warnings` may be meant so."""

    data: DataCheck
    measured: Measured
    parts: tuple[PartCount, ...]
    cost: Cost | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all was found."""
        return not self.problems and not self.data.bad_rows and not self.measured.skipped

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        faults = [str(fault) for fault in self.data.faults]
        data = {"rows": self.data.rows, "left_out": self.data.left_out, "media_checked": self.data.media_checked,
                "faults": faults, "more_faults": self.data.more, "notes": dict(self.data.notes),
                "formats": [list(entry) for entry in self.data.formats]}  # fmt: skip
        cost = None if self.cost is None else {**asdict(self.cost), "total": self.cost.total}
        return {
            "data": data, **self.measured.to_dict(), "parts": [asdict(part) for part in self.parts], "cost": cost,
            "problems": list(self.problems), "warnings": list(self.warnings),
        }  # fmt: skip


def check_run(
    run: FamilyConfig, *, media: int | None = MEDIA_ROWS, samples: int = MOST_SAMPLES,
    on_progress: Progress | None = None,
) -> Check:  # fmt: skip
    """Checks a run whose model's small files are here; no weights are read. `media` rows have their media opened, and
    `samples` become tokens, and those with the longest texts and the most media; None: all of both."""
    check_device(run.device)
    (stage,) = run.stages
    config = load_model_config(run.model)
    sets = [data_set(entry, run.output) for entry in (*stage.data, *stage.val_data)]
    question = partial(ground_question, load_generation_config(run.model))
    data = check_sets(sets, seed=run.seed, media=media, on_progress=on_progress, ground_question=question)
    layout = Layout.of_folder(run.model, max_tokens=stage.max_tokens)
    stream = open_stream(stage.data, run.output, seed=run.seed, epochs=1.0)
    style, problems, warnings = config.release.thinking, list[str](), list[str]()
    total = stream.epoch_samples if media is None else min(samples, stream.epoch_samples)

    def read() -> Iterator[Sample]:
        try:
            for sample in islice(stream, total):
                yield prepare(sample, stage.media, style)
        except KeyeError as error:  # too many rows that cannot be learnt from: those that were read are shown
            problems.append(str(error))

    measured = measure(
        read(), layout, most=total, seconds=math.inf if media is None else MOST_SECONDS,
        on_progress=None if on_progress is None else lambda done, left: on_progress("samples", done, total, left),
    )  # fmt: skip
    if media is not None and stage.too_long == "error" and not measured.too_long:
        # What is too long is most likely among these: found now, it does not end a run after hours.
        problems += _find_too_long((prepare(sample, stage.media, style) for sample in data.largest), layout)
    parts = _count_parts(run, config, problems)
    usable = stream.epoch_samples * (1 - data.left_out / max(1, data.rows))
    cost = None if problems or not measured.lengths else _predict(run, config, measured, usable)
    _judge(run, config, data, measured, cost, problems, warnings)
    return Check(data, measured, parts, cost, tuple(problems), tuple(warnings))


def _find_too_long(samples: Iterator[Sample], layout: Layout) -> list[str]:
    """The error of the first sample that is longer than a pack, of those that are reached in `MOST_SECONDS`."""
    begin = time.monotonic()
    for sample in samples:
        try:
            layout.lay_out(sample)
        except LengthError as error:
            return [str(error)]
        except KeyeError:
            pass  # left out by a run, and a fault of the data where it is read
        if time.monotonic() - begin > MOST_SECONDS:
            break
    return []


def _count_parts(run: FamilyConfig, config: KeyeConfig, problems: list[str]) -> tuple[PartCount, ...]:
    """Parts of the model with what of them is trained; a part that was asked for and has nothing is a problem."""
    (stage,) = run.stages
    with torch.device("meta"):
        model = KeyeModel(config)
    if run.lora is None:
        trained = choose_parameters(model, stage)
        counts = []
        for part in (*GROUPS, "embeddings", "norms"):
            names = [name for name, _ in model.named_parameters() if is_in_part(name, part)]
            own = [name for name in names if name in trained]
            counts += [PartCount(part, len(own), len(names), sum(trained[n].numel() for n in own))] if names else []
        return tuple(counts)
    try:
        lora = LoraParameters(model, run.lora)
    except LoraError as error:
        problems.append(str(error))
        return ()
    return tuple(PartCount(part, c.adapted, c.layers, c.numbers) for part, c in lora.counts.items())


def _predict(run: FamilyConfig, config: KeyeConfig, measured: Measured, rows: float) -> Cost:
    """Of a run over an epoch of so many `rows` that can be learnt from, as far as they can be laid out."""
    (stage,) = run.stages
    assert measured.tokens is not None
    share_usable = len(measured.lengths) / max(1, measured.samples)
    work = count_work(stage, measured.lengths, None if stage.epochs is None else rows * share_usable * stage.epochs)
    longest = stage.max_tokens if stage.packing else int(measured.tokens.most)
    share = measured.visual_share
    plan: TrainPlan = plan_training(config, run, stage, tokens=longest, visual_tokens=round(longest * share))
    mean = max(1, round(work.tokens / work.packs))
    typical = plan_training(config, run, stage, tokens=mean, visual_tokens=round(mean * share))
    rate = measure_rate(run.device, run.dtype)
    seconds = typical.seconds(work.packs, rate)
    return Cost(dict(plan.parts), free_memory(run.device), work.packs, work.steps, seconds)


@dataclass(frozen=True)
class Work:
    """What a run computes: `steps`, their `packs` and all `tokens` in these."""

    steps: int
    packs: int
    tokens: int


def count_work(stage: FamilyStage, lengths: Sequence[int], samples: float | None) -> Work:
    """Of so many samples (None: as many as the steps of the stage take) of lengths like `lengths`, put into steps and
    packs as training does; what samples share is not known here."""
    room = stage.batch * (stage.max_tokens if stage.packing else 1)
    most = _MOST_COUNTED if samples is None else max(1, min(_MOST_COUNTED, round(samples)))
    steps, packs, tokens, count, used = 1, 0, 0, 0, 0
    bins: list[int] = []  # tokens that the packs of this step still take
    for length in islice(cycle(lengths), most):
        size = length if stage.packing else 1
        if used + size > room:
            if steps == stage.steps:
                break
            steps, used, bins = steps + 1, 0, []
        place = next((i for i, free in enumerate(bins) if free >= length), None) if stage.packing else None
        if place is None:
            packs += 1
            bins.append(stage.max_tokens - length)
        else:
            bins[place] -= length
        used, tokens, count = used + size, tokens + length, count + 1
    wanted = math.inf if stage.steps is None else stage.steps / steps
    factor = max(1.0, min(wanted, math.inf if samples is None else samples / count))
    return Work(math.ceil(steps * factor), math.ceil(packs * factor), round(tokens * factor))


def _judge(
    run: FamilyConfig, config: KeyeConfig, data: DataCheck, measured: Measured, cost: Cost | None,
    problems: list[str], warnings: list[str],
) -> None:  # fmt: skip
    (stage,) = run.stages
    if measured.lengths and stage.epochs is None:
        mean = sum(measured.lengths) / len(measured.lengths)
        passes = stage.batch * (stage.max_tokens / mean if stage.packing else 1) / max(1, data.rows)
        if passes > _MOST_PASSES:
            problems.append(f"a step of {plural(stage.batch, 'pack')} takes all {plural(data.rows, 'row')} "
                            f"{passes:,.0f} times: lower --batch-size or --max-length, or give --epochs")  # fmt: skip
    if measured.too_long and stage.too_long == "error":
        problems.append(measured.too_long[0])
    elif measured.too_long:
        warnings.append(f"{plural(len(measured.too_long), 'sample')} of {measured.samples:,} have more than "
                        f"{stage.max_tokens:,} tokens and will be left out")  # fmt: skip
    if not measured.lengths and not problems:
        first = data.faults[0] if data.faults else measured.skipped[0] if measured.skipped else "there is none"
        problems.append(f"no sample can be learnt from; the first: {first}")
    if (times := measured.times).different:
        problems.append(f"{times.different:,} of {times.compared:,} times in prompts are not those of the files: "
                        f"{times.faults[0]}")  # fmt: skip
    if data.left_out and not problems and are_too_many(data.left_out, data.rows):
        problems.append(f"{data.left_out:,} of {data.rows:,} rows cannot be learnt from, more than {MAX_BAD:.0%}; the "
                        f"first is {data.faults[0]}")  # fmt: skip
    elif data.left_out:
        warnings.append(f"{plural(data.left_out, 'row')} of {data.rows:,} will be left out")
    if (opened := data.bad_rows - data.left_out) > 0:
        warnings.append(f"{plural(opened, 'row')} of {data.rows:,} with media that cannot be used, which will be left "
                        "out, or with times or boxes that do not fit them, which will be learnt")  # fmt: skip
    if measured.skipped:
        warnings.append(f"{plural(len(measured.skipped), 'sample')} of {measured.samples:,} cannot be laid out and "
                        f"will be left out; the first is {measured.skipped[0]}")  # fmt: skip
    sparse = config.text.sparse
    if sparse is not None and "indexer" in stage.frozen_parts:
        longer = sum(length > sparse.topk for length in measured.lengths)
        if longer:
            warnings.append(f"{longer:,} of {len(measured.lengths):,} samples have more than the {sparse.topk:,} keys "
                            "that sparse attention selects, while the indexer is frozen: it goes on to select what it "
                            "was trained to; --no-freeze-indexer teaches it")  # fmt: skip
    if cost is not None and cost.steps <= stage.warmup_steps:
        warnings.append(f"the run has {plural(cost.steps, 'step')}, and learning rates rise over the first "
                        f"{stage.warmup_steps:,}: give more --epochs, or fewer --warmup-steps")  # fmt: skip
    if cost is not None and cost.free is not None and cost.total > cost.free:
        warnings.append(f"about {format_bytes(cost.total)} are needed and {format_bytes(cost.free)} are free on "
                        f"{run.device}: lower --max-length, or give --quant int4")  # fmt: skip
