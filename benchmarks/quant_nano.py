"""What quantised weights cost keye-nano: bytes, the distance of its next-token probabilities, and its scores.

    python -m benchmarks.quant_nano                                  # bytes and distances: a minute
    python -m benchmarks.quant_nano --questions 2000 --formats bf16 int8 int4   # and scores: minutes for each format

`divergence` is the mean Kullback-Leibler divergence, in nats, from bfloat16 to the format over the tokens of answers to
64 questions about FrameForge clips of the split `test`, which calibration does not see; `same` is the share of these
tokens that stay the likeliest, if they were. `weights` is what quantised weights alone change, `run` what the format's
kernels change too, which round activations to int8 on processors that have them. Scores are of `keye eval frameforge`
with its defaults, the same questions for every format, one process each, one thread. `int4-data` weighs errors by what
64 clips of the training split show (`--data-aware frameforge`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye.cache.sequence import KVCache
from keye.chat.messages import Medium, Message
from keye.config import load_model_config
from keye.data import frameforge
from keye.engine.prompt import Prompt
from keye.hub import resolve
from keye.models.attention import CachedStep, Span
from keye.models.keye import KeyeModel
from keye.models.quantize import quantize_checkpoint
from keye.quant.policy import Policy, make_policy, quantised_part
from keye.quant.search import quantize

#: Format, group, and prompts that errors are weighed by.
FORMATS: dict[str, tuple[str, int | None, str | None]] = {
    "int8": ("int8", None, None), "int8-64": ("int8", 64, None), "int4": ("int4", 64, None),
    "int4-32": ("int4", 32, None), "int4-128": ("int4", 128, None), "int4-data": ("int4", 64, "frameforge"),
    "fp8": ("fp8", None, None),
}  # fmt: skip
CLIPS = 64
#: The token that ends a turn.
IM_END = 1752


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=0, help="also ask keye-nano so many questions in each format")
    parser.add_argument("--formats", nargs="+", choices=["bf16", *FORMATS], default=["bf16", *FORMATS])
    parser.add_argument("--jobs", type=int, default=1, help="formats that are asked at the same time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="keye-quant-") as scratch:
        result: dict[str, dict[str, Any]] = {name: {"bytes": write(name, Path(scratch))} for name in options.formats}
        for name, distances in compare([n for n in options.formats if n != "bf16"], Path(scratch)).items():
            result[name] |= distances
        if options.questions:
            with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
                places = [str(folder_of(name, Path(scratch))) for name in options.formats]
                scores = pool.map(score, options.formats, places, [options.questions] * len(places))
                for name, figures in zip(options.formats, scores, strict=True):
                    result[name] |= figures
        if "int4-data" in options.formats:
            result["int4-data"]["errors_by_data"] = errors_by_data()
    print(json.dumps(result, indent=2))


def folder_of(name: str, scratch: Path) -> Path:
    return resolve("nano") if name == "bf16" else scratch / name


def write(name: str, scratch: Path) -> int:
    """Quantises keye-nano; the bytes of its tensors."""
    source = resolve("nano")
    if name == "bf16":
        return sum(p.nbytes for p in keye.load("nano").model.parameters())
    kind, group, prompts = FORMATS[name]
    return quantize_checkpoint(
        source, load_model_config(source), scratch / name, policy(kind, group), calibration=prompts,
        calibrate=None if prompts is None else importance,
    ).bytes  # fmt: skip


def policy(kind: str, group: int | None) -> Policy:
    return make_policy(kind, group)


def importance() -> dict[str, torch.Tensor]:
    from keye.evals.health.calibration import frameforge_prompts, measure_importance

    return measure_importance(keye.load("nano"), frameforge_prompts())


def errors_by_data() -> dict[str, dict[str, float]]:
    """Error of matrices in int4 per 64 where each input counts by its mean square, by part: without and with it in the
    search of scales."""
    counts, model = importance(), keye.load("nano", dtype="float32").model
    sums: dict[str, list[float]] = {}
    for name, weight in model.state_dict().items():
        part, form = quantised_part(name), policy("int4", 64).format_of(name)
        if name not in counts or part is None or form is None or form.kind != "int4":
            continue
        numbers = weight.transpose(1, 2) if weight.dim() == 3 else weight
        by_input = counts[name].unsqueeze(1) if weight.dim() == 3 else counts[name]
        squares = sums.setdefault(part, [0.0, 0.0, 0.0])
        squares[0] += float((numbers.square() * by_input).sum())
        for place, importances in ((1, None), (2, counts[name])):
            parts = [(numbers, importances)] if weight.dim() == 2 else [
                (numbers[e], None if importances is None else importances[e]) for e in range(len(numbers))
            ]  # fmt: skip
            codes = [quantize(matrix, form, own).dequantize() for matrix, own in parts]
            error = torch.stack(codes).view_as(numbers) - numbers
            squares[place] += float((error.square() * by_input).sum())
    return {part: {"plain": round((plain / total) ** 0.5, 4), "by_data": round((data / total) ** 0.5, 4)}
            for part, (total, plain, data) in sums.items()}  # fmt: skip


def compare(names: Sequence[str], scratch: Path) -> dict[str, dict[str, float]]:
    """How far the next-token probabilities of each format are from those of bfloat16."""
    plain = keye.load("nano")
    prompts = list(test_prompts(plain))
    exact = [probabilities(plain.model, *prompt) for prompt in prompts]
    results = {}
    for name in names:
        model = keye.load(scratch / name).model
        results[name] = {"run": distance(model, prompts, exact), "weights": distance(plain_copy(model), prompts, exact)}
    return results


def test_prompts(model: keye.Keye) -> Iterator[tuple[Prompt, int]]:
    """Clips of the split `test`, each with a question and its answer, and the tokens before the answer."""
    rng = random.Random(0)
    for _ in range(CLIPS):
        clip = frameforge.make_clip(
            rng.getrandbits(60), frames=rng.randint(16, 32), objects=4, split="test", size=(112, 112)
        )
        (question,) = frameforge.questions(clip, rng, 1)
        medium = Medium("video", keye.Frames(frameforge.render(clip), clip.timestamps))
        messages = [Message("user", (medium, question.text)), Message("assistant", (question.answer,))]
        yield model.runtime.prompts.build(messages), model.runtime.prompts.build(messages[:1]).length


def probabilities(model: KeyeModel, prompt: Prompt, before: int) -> torch.Tensor:
    """Log-probabilities of each token of the answer, float32 [tokens, vocabulary]."""
    vision, text = prompt.vision(), model.config.text
    assert vision is not None
    with torch.inference_mode():
        x = model.embed(prompt.token_ids, model.encode_vision(*vision))
        step = CachedStep([Span(0, x.shape[0], KVCache(text.num_hidden_layers))], text)
        hidden = model(x, prompt.position_ids, step)
        end = before + prompt.token_ids[before:].tolist().index(IM_END) + 1  # the next turn begins behind it
        return model.logits(hidden[before - 1 : end - 1]).log_softmax(-1)


def plain_copy(quantised: KeyeModel) -> KeyeModel:
    """The numbers of a quantised model in an ordinary one, float32."""
    from keye.models.load import load_tensors
    from keye.models.quant_fill import plain_state, quantized_weights

    config = load_model_config(resolve("nano"))
    numbers = {name: weight.tensor.dequantize() for name, weight in quantized_weights(quantised).items()}
    state = {name: n.transpose(1, 2).contiguous() if n.dim() == 3 else n for name, n in numbers.items()}
    model = KeyeModel(config).eval()
    load_tensors(model, {**plain_state(quantised), **state})
    return model


def distance(
    model: KeyeModel, prompts: Sequence[tuple[Prompt, int]], exact: Sequence[torch.Tensor]
) -> dict[str, float]:
    divergences, same = [], []
    for prompt, expected in zip(prompts, exact, strict=True):
        other = probabilities(model, *prompt)
        divergences.append((expected.exp() * (expected - other)).sum(-1))
        same.append(expected.argmax(-1) == other.argmax(-1))
    return {"divergence": round(float(torch.cat(divergences).mean()), 5),
            "same": round(float(torch.cat(same).float().mean()), 4)}  # fmt: skip


def score(name: str, folder: str, count: int) -> dict[str, Any]:
    """Scores of a format."""
    from keye.evals.tasks.frameforge import EvalOptions, evaluate

    torch.set_num_threads(1)
    result = evaluate(keye.load(folder).runtime, EvalOptions(questions=count))
    print(f"{name}: accuracy {result['accuracy']}, mIoU {result['miou']}", file=sys.stderr, flush=True)
    return {key: result[key] for key in ("questions", "accuracy", "accuracy_error", "miou", "miou_error", "seconds")}


if __name__ == "__main__":
    main()
