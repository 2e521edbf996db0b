"""Stages that sample replies of the model and write data for later ones: preference pairs, and labels of the auto mode.

Every process samples the same replies; the first one writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from keye.chat.replies import parse_reply
from keye.data.samples import Sample
from keye.engine.prompt import Prompt
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError, KeyeWarning, warn
from keye.models.keye import KeyeModel
from keye.train.batches import derived_seed
from keye.train.modes import PassRates, Style, write_reply
from keye.train.pairs import (
    Judge,
    choose_pair,
    extract_answer,
    grade_reply,
    reply_text,
    score_answer,
    to_row,
)  # fmt: skip
from keye.train.recipe import Figures
from keye.train.recipes.family.batches import open_stream, prepare
from keye.train.recipes.family.config import FamilyStage
from keye.train.recipes.family.shared_files import write_shared
from keye.train.rollouts import Rollout, Sampler

#: Prompts whose replies are sampled together.
TOGETHER = 8
#: Prompts of which looping replies are counted at the end of a stage.
MOST_COUNTED = 64
#: How right an answer must be to count as right.
LEAST_RIGHT = 0.5


def samples_file(folder: Path, stage: FamilyStage) -> Path:
    """The file of the output folder that a stage writes its samples to."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', stage.name).strip('-') or 'stage'}.jsonl"


def sample_pairs(stage: FamilyStage, model: KeyeModel, folder: Path, seed: int) -> dict[str, float]:
    """Writes a preference pair for each prompt whose replies differ in what the rules or the judge say."""
    judge = _judge(stage)
    sampler, figures = make_sampler(stage, model, folder), Figures()
    style = sampler.layout.builder.config.release.thinking

    def rows() -> Iterator[dict[str, Any]]:
        for sample, rollouts in _rollouts(stage, folder, sampler, seed, None):
            grades = [grade_reply(sample, rollout, style, judge) for rollout in rollouts]
            weight = 0.0 if stage.judge is None else stage.judge.weight
            pair = choose_pair(rollouts, [grade.score(weight) for grade in grades])
            for grade in grades:
                figures.add("looping", grade.is_looping)
                figures.add("formed", grade.is_formed)
                figures.add("right", grade.right or 0.0, grade.right is not None)
            figures.add("pairs", pair is not None)
            if pair is not None:
                yield to_row(sample, pair[0].text, pair[1].text)

    count = _write(samples_file(folder, stage), rows())
    if not count:
        raise KeyeError(f"stage {stage.name!r}: no prompt has replies of different worth; raise sampling.temperature "
                        "or sampling.replies, or take other data")  # fmt: skip
    return {**figures.take(), "rows": float(count)}


def sample_modes(stage: FamilyStage, model: KeyeModel, folder: Path, seed: int) -> dict[str, float]:
    """Writes an auto reply for each prompt: one that thinks where the model answers right more often so."""
    sampler, figures = make_sampler(stage, model, folder), Figures()
    style = sampler.layout.builder.config.release.thinking

    def rows() -> Iterator[dict[str, Any]]:
        direct = _rollouts(stage, folder, sampler, seed, False)
        thinking = _rollouts(stage, folder, sampler, seed, True)
        for (sample, quick), (_, slow) in zip(direct, thinking, strict=True):
            gold = extract_answer(reply_text(sample))
            rates = PassRates(_pass_rate(quick, gold), _pass_rate(slow, gold))
            needed = rates.needs_thinking()
            figures.add("direct", rates.direct)
            figures.add("thinking", rates.thinking)
            figures.add("needed", needed)
            yield to_row(sample, _auto_reply(sample, slow, gold, style, needed), mode="auto")

    count = _write(samples_file(folder, stage), rows())
    return {**figures.take(), "rows": float(count)}


def count_loops(stage: FamilyStage, model: KeyeModel, folder: Path, seed: int) -> float:
    """The share of replies that repeat themselves, over the first prompts of a stage's data."""
    sampler, figures = make_sampler(stage, model, folder), Figures()
    for _, rollouts in islice(_rollouts(stage, folder, sampler, seed, None), MOST_COUNTED):
        for rollout in rollouts:
            figures.add("looping", rollout.is_looping)
    return figures.take().get("looping", 0.0)


def make_sampler(stage: FamilyStage, model: KeyeModel, folder: Path) -> Sampler:
    """Samples as the stage attends."""
    return Sampler(
        model, folder, attention="sparse" if stage.attention == "sparse" else "dense", max_tokens=stage.max_tokens
    )


def sampling_params(stage: FamilyStage, seed: int) -> SamplingParams:
    """How the stage samples."""
    rollout = stage.rollout
    return SamplingParams(
        max_tokens=rollout.max_tokens, temperature=rollout.temperature, top_p=rollout.top_p, seed=seed % 2**31
    )


def _judge(stage: FamilyStage) -> Judge | None:
    if stage.judge is None:
        return None
    key = None
    if stage.judge.key_file is not None:
        try:
            key = stage.judge.key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyeError(f"judge.key_file {stage.judge.key_file} cannot be read ({error})") from None
    return Judge(stage.judge.url, stage.judge.model, key, stage.judge.timeout)


def _rollouts(
    stage: FamilyStage, folder: Path, sampler: Sampler, seed: int, thinking: bool | None
) -> Iterator[tuple[Sample, list[Rollout]]]:
    """Samples of the data with replies to them; `thinking` None is as each sample's mode says."""
    stream = open_stream(stage.data, folder, seed=seed, epochs=stage.epochs or 1.0)
    prompts = islice(_prompts(stage, sampler, stream, thinking), stage.rollout.prompts)
    for number, group in enumerate(iter(lambda: list(islice(prompts, TOGETHER)), [])):
        replies: dict[int, list[Rollout]] = {}
        for thinks in (None, False, True):
            places = [place for place, entry in enumerate(group) if entry.thinks is thinks]
            params = sampling_params(stage, derived_seed(seed, number, thinks))
            chosen = [group[place].prompt for place in places]
            results = sampler.sample(chosen, params, stage.rollout.replies, thinking=thinks) if places else []
            replies |= dict(zip(places, results, strict=True))
        yield from ((entry.sample, replies[place]) for place, entry in enumerate(group))


class _Prompted(NamedTuple):
    sample: Sample
    prompt: Prompt
    thinks: bool | None


def _prompts(
    stage: FamilyStage, sampler: Sampler, stream: Iterable[Sample], thinking: bool | None
) -> Iterator[_Prompted]:
    """The samples that can be asked, with their prompts; others are left out, as they are in training."""
    for sample in stream:
        if sample.plain:
            continue
        prepared = prepare(sample, stage.media, None)
        thinks = {"think": True, "no_think": False}.get(sample.mode or "") if thinking is None else thinking
        try:
            yield _Prompted(prepared, sampler.lay_out(prepared, thinks), thinks)
        except KeyeError as error:
            warn(KeyeWarning(f"{sample.place} is left out: {error}"), stacklevel=2)


def _pass_rate(rollouts: list[Rollout], gold: str) -> float:
    right = [score_answer(extract_answer(rollout.text), gold) >= LEAST_RIGHT for rollout in rollouts]
    return sum(right) / len(right)


def _auto_reply(sample: Sample, slow: list[Rollout], gold: str, style: Style, needed: bool) -> str:
    """The reply that is learnt: after the shortest reasoning of the model that led to the right answer."""
    if not needed:
        return write_reply(gold, None, "auto", style)
    right = [
        r for r in slow if score_answer(extract_answer(r.text), gold) >= LEAST_RIGHT and parse_reply(r.text).reasoning
    ]
    best = min(right, key=lambda rollout: len(rollout.token_ids), default=None)
    reasoning = parse_reply(reply_text(sample) if best is None else best.text).reasoning
    return write_reply(gold, reasoning, "auto", style)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines, complete or not at all; how many there are."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_shared(path, "".join(lines))
    return len(lines)
