"""How often the frames that an answer is said to rest on show what was asked about, on FrameForge.

Asks grounding questions about clips, counts which keys the indexers selected while the answers were written, and looks
whether the most selected frames (top 1, and the share of the top 3) lie inside the true intervals. `chance` is the
share of frames inside. `choices` compares ways to aggregate: layers, and the lift over other questions on the same
clip; `used` is the one that `keye.engine.evidence` has, chosen on the split `train`. Questions whose interval is the
whole clip are left out. Prints JSON. Run:
    python benchmarks/evidence.py --json [--model nano] [--split test] [--questions 600]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import keye
from keye.data import frameforge
from keye.data.frameforge import Clip, Question
from keye.engine.evidence import counted_layers, frame_spans
from keye.engine.prompt import Prompt
from keye.engine.sampling import SamplingParams
from keye.evals.figures.summary import GROUNDING_TASKS
from keye.evals.tasks.frameforge import FRAME_SIZE, ClipPrompt, frames_of

MAX_TOKENS = 64
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One question: selections [layers, frames] and which frames are inside the true intervals; `clip` numbers it."""

    clip: int
    selected: Scores
    inside: NDArray[np.bool_]


def clips(split: str, wanted: int) -> Iterator[tuple[Clip, list[Question]]]:
    """Clips with grounding questions, `wanted` in all."""
    rng = frameforge.stream(split, 0, "evidence")
    while wanted > 0:
        clip = frameforge.make_clip(
            rng.getrandbits(60), frames=rng.randint(16, 32), objects=4, split=split, size=FRAME_SIZE
        )
        request = [q for q in frameforge.questions(clip, rng, 8, tasks=GROUNDING_TASKS) if not _inside(clip, q).all()]
        request = request[:wanted]
        wanted -= len(request)
        if request:
            yield clip, request


def _inside(clip: Clip, question: Question) -> NDArray[np.bool_]:
    intervals = question.intervals or ()
    return np.array([any(start <= t <= end for start, end in intervals) for t in clip.timestamps])


def selections(sets: Tensor, prompt: Prompt) -> Scores:
    """Selections [layers, frames] of a reply whose steps read `sets` int [tokens, layers, k], -1 for none."""
    layers = sets.shape[1]
    counts = torch.zeros(layers, int(sets.max()) + 2, dtype=torch.int64)
    places = sets.transpose(0, 1).reshape(layers, -1).long() + 1  # in column 0 what is none
    counts.scatter_add_(1, places, torch.ones_like(places))
    (spans,) = frame_spans(prompt)
    return np.stack([counts[:, start + 1 : stop + 1].sum(1).numpy() for start, stop in spans], axis=1).astype(float)


def ask_all(model: keye.Keye, split: str, wanted: int) -> list[Row]:
    params = SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=(model.tokenizer.token_id("<|im_end|>"),))
    rows = list[Row]()
    for number, (clip, request) in enumerate(clips(split, wanted)):
        prompt = ClipPrompt(
            model.runtime.prompts,
            frames_of(clip, model.runtime.processor.config),
            [question.text for question in request],
        )
        trunk, _ = model.engine.prefill(prompt.trunk)
        prompts = [prompt.continue_trunk(branch, trunk) for branch in prompt.branches]
        results = model.engine.generate(prompts, params, indexer_sets=True)
        trunk.free()
        for question, result in zip(request, results, strict=True):
            sets = result.completions[0].indexer_sets
            assert sets is not None
            rows.append(Row(number, selections(sets, prompt.trunk), _inside(clip, question)))
    return rows


def figures(rows: list[Row], score: Callable[[Row], Scores]) -> dict[str, float]:
    """Percent of top-1 frames inside, of top-3 frames inside, and of questions with any of the top 3 inside."""
    orders = [np.argsort(-score(row), kind="stable")[:3] for row in rows]
    hits = [row.inside[order] for row, order in zip(rows, orders, strict=True)]
    result = {
        "top1": np.mean([hit[0] for hit in hits]), "top3": np.mean([hit.mean() for hit in hits]),
        "any_of_top3": np.mean([hit.any() for hit in hits]),
    }  # fmt: skip
    return {name: round(100 * float(value), 1) for name, value in result.items()}


def standard_error(rows: list[Row], score: Callable[[Row], Scores]) -> float:
    """Of top 1 in percent, with clips as clusters."""
    hits = np.array([row.inside[np.argmax(score(row))] for row in rows], dtype=float)
    clusters = np.array([row.clip for row in rows])
    sums = [(hits[clusters == c] - hits.mean()).sum() for c in np.unique(clusters)]
    return round(100 * float(np.sqrt(np.square(sums).sum())) / len(hits), 1)


def over_others(rows: list[Row], used: slice) -> Callable[[Row], Scores]:
    """The share of each frame over its mean share in the other questions on the clip; the share alone without any."""

    def shares(row: Row) -> Scores:
        total = row.selected[used].sum(0)
        return total / max(1.0, total.sum())

    def score(row: Row) -> Scores:
        others = [shares(other) for other in rows if other.clip == row.clip and other is not row]
        return shares(row) / (np.mean(others, axis=0) + 1 / row.inside.size) if others else shares(row)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--split", default="test", choices=("train", "test", "unseen"))
    parser.add_argument("--questions", type=int, default=600)
    arguments = parser.parse_args()
    model = keye.load(arguments.model)
    rows = ask_all(model, arguments.split, arguments.questions)
    layers = rows[0].selected.shape[0]
    used = counted_layers(layers)
    choices = {"all layers": slice(0, layers), "upper half": slice(layers // 2, layers), "upper two thirds": used}
    choices |= {f"layer {i}": slice(i, i + 1) for i in range(layers)}
    compared = {
        name: figures(rows, lambda row, part=part: row.selected[part].sum(0))  # type: ignore[misc]
        for name, part in choices.items()
    }
    compared["upper two thirds, over other questions"] = figures(rows, over_others(rows, used))
    chance = round(100 * float(np.mean([row.inside.mean() for row in rows])), 1)
    result = {
        "model": model.name, "split": arguments.split, "questions": len(rows), "clips": rows[-1].clip + 1,
        "chance": chance, "used": compared["upper two thirds"],
        "top1_error": standard_error(rows, lambda row: row.selected[used].sum(0)), "choices": compared,
    }  # fmt: skip
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
