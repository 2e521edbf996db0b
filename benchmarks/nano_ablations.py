"""What each decision of keye-nano's recipe is worth: the tables of docs/training.md, one line of JSON for each row.

Without training, of finished weights (about a minute a row and core):
    python -m benchmarks.nano_ablations look [--model nano] [--n 600] >> results.jsonl
Each training arm starts from one saved dense stage with a new indexer and takes at most 30 core minutes:
    python -m benchmarks.nano_ablations arms --dense FOLDER --output FOLDER [--only "no warm-up" ...] >> results.jsonl
An arm that was interrupted goes on where it stopped. Markdown of what there is:
    python -m benchmarks.nano_ablations table results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye.config import load_model_config
from keye.evals.tasks.frameforge import EvalOptions, evaluate
from keye.hub import asset
from keye.models.load import load_model, save_model
from keye.train.loop import train
from keye.train.packed import TreeStep
from keye.train.recipe import move_batch
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import Mix, NanoConfig, NanoStage, NanoTable
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.recipes.nano.recipe import NanoRecipe, encode_frames

TOPKS = (32, 64, 128, 256)
FRAMES = (32, 64)
MIX = (
    Mix(frames=8, clips=6, questions=14, weight=0.1), Mix(frames=16, clips=4, questions=16, weight=0.35),
    Mix(frames=32, clips=2, questions=18, weight=0.35), Mix(frames=64, clips=1, questions=24, weight=0.2),
)  # fmt: skip
STEPS, WARMUP_STEPS = 400, 80
#: Clips that start at 0 seconds with two frames a second: a model that reads no timestamps can know them too.
PLAIN_CLOCK = (0.0, 0.5)


@dataclass(frozen=True)
class Arm:
    """One way to adapt a dense model: what share of the steps warms the indexer up, how the rest attends, with how many
    keys, whether frames say their time, whether clips have the plain clock, and the seed."""

    warmup: bool = True
    attention: str = "sparse"
    topk: int = 64
    times: bool = True
    plain: bool = False
    seed: int = 0


ARMS = {
    "warm-up, then sparse": Arm(),
    "no warm-up": Arm(warmup=False),
    "dense": Arm(warmup=False, attention="dense"),
    **{f"top {topk}": Arm(topk=topk) for topk in TOPKS if topk != 64},
    "timestamps as text": Arm(plain=True),
    "no timestamps": Arm(plain=True, times=False),
    "another seed": Arm(seed=1),
}
#: Weights that are averaged: the ingredients are arms.
MERGED = ("warm-up, then sparse", "another seed")


def copy_model(source: Path, target: Path, *, topk: int | None = None, times: bool = True) -> None:
    """The files of a model with another number of keys, or without times before its frames."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            shutil.copy(path, target)
    if topk is not None:
        _edit(target / "config.json", lambda fields: fields["sa_config"].update(topk=topk))
    if not times:
        _edit(target / "preprocessor_config.json", lambda fields: fields["keye"].update(frame_text="<|frame|>"))


def _edit(path: Path, change: Any) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields, indent=2))


def scores(folder: Path, count: int, mode: str, clock: tuple[float, float] | None = None) -> Iterator[dict[str, Any]]:
    """Accuracy and mIoU at each number of frames, beside what answering with the whole video scores."""
    runtime = keye.load(str(folder)).runtime
    for frames in FRAMES:
        options = EvalOptions(frames=(frames, frames), questions=count, mode=mode, clock=clock)  # type: ignore[arg-type]
        result = evaluate(runtime, options)
        names = ("questions", "accuracy", "accuracy_error", "miou", "miou_error", "whole_video_miou")
        yield {"frames": frames, **{name: result[name] for name in names}}


@torch.no_grad()
def recall(folder: Path, frames: int, batches: int = 8) -> dict[str, float]:
    """Attention that the chosen keys get in dense attention over what the best as many keys would get: the mean over
    layers and the lowest layer, over the tokens of packed clips that see more keys than they choose."""
    config = load_model_config(folder)
    model, _ = load_model(folder, config, device="cpu", dtype=torch.bfloat16)
    stage = NanoStage(name="recall", steps=1, attention="warmup", trains="indexer",
                      nano=NanoTable(split="test", mix=(Mix(frames=frames, clips=1, questions=12),)))  # fmt: skip
    mass, best = [0.0] * config.text.num_hidden_layers, [0.0] * config.text.num_hidden_layers
    for seed in range(batches):
        batch = move_batch(make_batch(stage, folder, seed), model.device)
        ids = torch.cat((batch.trunk_ids, batch.tail_ids), dim=1).flatten()
        step = TreeStep(batch.segments, config.text, "sparse", teach=False, measure_recall=True)
        visual = encode_frames(model, batch.frames.flatten(0, 1))
        model(model.embed(ids, visual), batch.positions.transpose(0, 1).flatten(1), step)
        for layer, measured in enumerate(step.recalls()):
            mass[layer] += measured.mass
            best[layer] += measured.best
    shares = [a / b for a, b in zip(mass, best, strict=True)]
    return {"recall": round(sum(shares) / len(shares), 4), "lowest_layer": round(min(shares), 4)}


def look(model: str, count: int, work: Path) -> Iterator[dict[str, Any]]:
    """Finished weights with other numbers of keys than they were trained with, and with dense attention."""
    source = asset(model) if model == "nano" else Path(model)
    for topk in TOPKS:
        folder = work / f"top{topk}"
        copy_model(source, folder, topk=topk)
        for row in scores(folder, count, "sparse"):
            yield {"table": "keys", "arm": f"top {topk}", "model": model, **row, **recall(folder, row["frames"])}
    for row in scores(source, count, "dense"):
        yield {"table": "keys", "arm": "dense", "model": model, **row}


def begin(dense: Path, folder: Path, arm: Arm) -> None:
    """The dense stage with the arm's settings and an indexer that has learnt nothing."""
    copy_model(dense, folder, topk=arm.topk, times=arm.times)
    config = load_model_config(folder)
    model, _ = load_model(folder, config, device="cpu", dtype=torch.bfloat16)
    fresh = dict(fresh_model(config, 17).named_parameters())
    for name, parameter in model.named_parameters():
        if ".sa_indexer." in name:
            parameter.data.copy_(fresh[name])
    save_model(model, folder, dtype=torch.bfloat16)


def stages(arm: Arm, steps: int, warmup: int) -> tuple[NanoStage, ...]:
    """The stages of an arm; all arms take equally many steps."""
    common = {"mix": MIX, "plain_times": 1.0 if arm.plain else 0.1}
    adapt = NanoStage(
        name="adapt", steps=steps - warmup * arm.warmup, trains="decoder", attention=arm.attention, lr=1e-3,  # type: ignore[arg-type]
        adam_lr=8e-4, warmup_steps=20, decay_fraction=0.7, nano=NanoTable(**common, pointing=0.05),
    )  # fmt: skip
    if not arm.warmup:
        return (adapt,)
    teach = NanoStage(name="warm-up", steps=warmup, trains="indexer", attention="warmup", adam_lr=4e-3,
                      decay_fraction=0.5, warmup_steps=10, nano=NanoTable(**common))  # fmt: skip
    return teach, adapt


def run_arm(name: str, dense: Path, output: Path, steps: int, warmup: int, count: int) -> Iterator[dict[str, Any]]:
    """Trains an arm, or goes on with it, and scores it."""
    arm, folder = ARMS[name], output / name.replace(", ", "-").replace(" ", "-")
    start = folder / "start"
    if not (start / "model.safetensors").exists():
        begin(dense, start, arm)
    config = NanoConfig(recipe="nano", model=start, output=folder / "run", seed=arm.seed, save_minutes=2.0,
                        stage=stages(arm, steps, warmup))  # fmt: skip
    began = time.process_time()
    train(config, NanoRecipe())
    seconds = round(time.process_time() - began, 1)
    for row in scores(folder / "run", count, arm.attention, PLAIN_CLOCK if arm.plain else None):
        measured = {} if arm.attention == "dense" else recall(folder / "run", row["frames"])
        yield {"table": "arms", "arm": name, "steps": steps, "cpu_seconds": seconds, **row, **measured}


def merge(output: Path, count: int) -> Iterator[dict[str, Any]]:
    """The mean of the weights of two arms that differ in their seed alone."""
    folders = [output / name.replace(", ", "-").replace(" ", "-") / "run" for name in MERGED]
    config = load_model_config(folders[0])
    models = [load_model(folder, config, device="cpu", dtype=torch.float32)[0] for folder in folders]
    with torch.no_grad():
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.lerp_(b, 0.5)
    copy_model(folders[0], output / "merged")
    save_model(models[0], output / "merged", dtype=torch.bfloat16)
    for row in scores(output / "merged", count, "sparse"):
        yield {"table": "arms", "arm": "mean of two seeds", **row, **recall(output / "merged", row["frames"])}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each arm and number of frames."""
    rows = ["arm | frames | questions | accuracy | mIoU | whole video | recall (lowest layer)", "|".join(["---"] * 7)]
    for line in lines:
        share = f"{100 * line['recall']:.1f} ({100 * line['lowest_layer']:.1f})" if "recall" in line else "-"
        right = f"{line['accuracy']:.1f} ± {line['accuracy_error']:.1f}"
        located = f"{line['miou']:.1f} ± {line['miou_error']:.1f} | {line['whole_video_miou']:.1f}"
        rows.append(f"{line['arm']} | {line['frames']} | {line['questions']} | {right} | {located} | {share}")
    return "".join(f"| {row} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["look", "arms", "merge", "table"])
    parser.add_argument("results", type=Path, nargs="?", help="lines to make a table of")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dense", type=Path, help="a model after its dense stage")
    parser.add_argument("--output", type=Path, default=Path("/tmp/nano-ablations"))
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="how many of the steps warm the indexer up")
    parser.add_argument("--n", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "table":
        sys.stdout.write(table([json.loads(line) for line in arguments.results.read_text().splitlines()]))
        return
    if arguments.what == "look":
        rows = look(arguments.model, arguments.n, arguments.output)
    elif arguments.what == "merge":
        rows = merge(arguments.output, arguments.n)
    else:
        if arguments.dense is None:
            parser.error("arms start from a saved dense stage; give its folder with --dense")
        options = arguments.output, arguments.steps, arguments.warmup, arguments.n
        rows = (row for name in arguments.only for row in run_arm(name, arguments.dense, *options))
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
