"""`keye merge`: an adapter into a model, or several models into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.units import format_bytes

if TYPE_CHECKING:
    from keye.train.merge_search import SearchResult, Trial

_TYPES = ("BF16", "F16", "F32")
_MILLION = 1_000_000


@click.command(context_settings=options.CONTEXT)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="The folder to write.")
@click.option("--adapter", type=options.PATH, metavar="DIR", help="Add a LoRA adapter to the weights of one MODEL.")
@click.option("--weights", metavar="W,W,...", help="What each model counts, as 0.5,0.3,0.2.  [default: all the same]")
@click.option("--base", metavar="MODEL",
              help="Add the weighted differences from this model to it; weights need not add up to 1.")  # fmt: skip
@click.option("--search", "data", metavar="DATA", multiple=True,
              help="Search for the weights that score best on held-out conversations; may be repeated.")  # fmt: skip
@click.option("--score", type=click.Choice(["exact", "loss"]),
              help="Search by replies in the same words, or by their loss.  [default: exact]")  # fmt: skip
@click.option("--trials", type=options.COUNT, metavar="N", help="Most weights to try.  [default: 24]")
@click.option("--type", "kind", type=click.Choice(_TYPES, case_sensitive=False), default="BF16", show_default=True,
              help="Number format of the weights.")  # fmt: skip
@options.overwrite
@options.as_json
@options.debug
def merge(
    models: tuple[str, ...], output: Path, adapter: Path | None, weights: str | None, base: str | None,
    data: tuple[str, ...], score: str | None, trials: int | None, kind: str, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a model whose weights hold an adapter, or are the average of several models.

    Tensors are read and written one after another, so that memory is that of the largest. Models to average have one
    configuration and one tokenizer. A search keeps one model in memory, tries each model alone, their mean, and then
    steps from the best weights so far; trials.jsonl in the output has every trial, and after a kill the same command
    goes on there.

    \b
    keye merge 1.5 --adapter runs/captions -o keye-1.5-captions
    keye merge runs/a runs/b runs/c --weights 0.5,0.3,0.2 -o average
    keye merge runs/count runs/read --base 1.5 --weights 0.7,0.7 -o both
    keye merge runs/a runs/b runs/c --search dev.jsonl --trials 30 -o best
    """
    from keye.commands.shared import show

    if unused := [flag for flag, value in (("--score", score), ("--trials", trials)) if value is not None and not data]:
        raise KeyeError(f"{unused[0]} is about a search: name held-out data with --search")
    if adapter is not None:
        _check_single(models, adapter, weights, base, data)
        _check_output(output, overwrite)
        result = _merge_adapter(models[0], adapter, output, kind)
    else:
        if data and (weights is not None or base is not None):
            raise KeyeError("--search finds the weights: leave --weights and --base out")
        _check_output(output, overwrite, is_search=bool(data))
        result = _average(models, output, kind, weights, base, data, score or "exact", trials or 24, quiet=as_json)
    if as_json:
        show.print_json(result)
    else:
        size = format_bytes(sum(file.stat().st_size for file in output.glob("*.safetensors")))
        show.print_line(f"{output} is complete ({size}, {kind}); every command takes it as --model")


def _check_single(
    models: Sequence[str], adapter: Path, weights: str | None, base: str | None, data: Sequence[str]
) -> None:
    if len(models) != 1 or weights is not None or base is not None or data:
        raise KeyeError("--adapter is merged into one model: name that alone, without --weights, --base and --search")
    if not (adapter / "adapter_config.json").is_file():
        raise KeyeError(f"{adapter} is not a folder of an adapter: it holds no adapter_config.json")


def _check_output(output: Path, overwrite: bool, *, is_search: bool = False) -> None:
    from keye.train.merge_search import TRIALS_FILE

    if output.exists() and not output.is_dir():
        raise KeyeError(f"{output} is a file: name a folder to write")
    present = {file.name for file in output.iterdir()} if output.is_dir() else set()
    if present - ({TRIALS_FILE} if is_search else set()) and not overwrite:
        raise KeyeError(f"{output} is not empty: name another folder, or give --overwrite")


def _merge_adapter(model: str, adapter: Path, output: Path, kind: str) -> dict[str, Any]:
    from keye.commands.shared import inputs, show
    from keye.train.merge import merge_adapter

    folder = inputs.find_model(model)
    with show.progress_bar("merging, million weights", notes=True) as advance:
        merge_adapter(
            folder, adapter, output, dtype=_dtype(kind),
            on_progress=lambda done, total: advance(done // _MILLION, max(1, total // _MILLION)),
        )  # fmt: skip
    _complete(folder, output, kind)
    return {"output": str(output), "model": model, "adapter": str(adapter), "type": kind}


def _average(
    models: Sequence[str], output: Path, kind: str, weights: str | None, base: str | None, data: Sequence[str],
    score: Any, trials: int, *, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from keye.commands.shared import inputs, show
    from keye.train.merge import Average, complete_weights

    for model in models:
        if (Path(model) / "adapter_config.json").is_file():
            raise KeyeError(f"{model} is an adapter: merge it into its model with --adapter {model}")
        if model.replace(".", "", 1).isdecimal() and not Path(model).exists() and weights is not None:
            raise KeyeError(f"{model} is not a model: write all weights behind --weights with commas, as 0.5,0.3,0.2")
    named = [*models, *([base] if base is not None else [])]
    average = Average([inputs.find_model(model) for model in named])
    result: dict[str, Any] = {"output": str(output), "models": named, "type": kind}
    if data:
        outcome = _search(average, output, data, score, trials, quiet=quiet)
        chosen = outcome.best.weights
        result |= outcome.to_dict()
    else:
        count = len(models)
        parsed = [1 / count] * count if weights is None else _parse_weights(weights)
        chosen = complete_weights(parsed, count, has_base=base is not None)
        result["weights"] = list(chosen)
    with show.progress_bar("merging, million weights", notes=True) as advance:
        average.write(
            chosen, output, dtype=_dtype(kind),
            on_progress=lambda done, total: advance(done // _MILLION, max(1, total // _MILLION)),
        )  # fmt: skip
    _complete(average.folders[0], output, kind)
    return result


def _search(
    average: Any, output: Path, data: Sequence[str], score: Any, trials: int, *, quiet: bool
) -> SearchResult:  # fmt: skip
    from keye import load
    from keye.commands.shared import inputs, show
    from keye.data.sources import DataSet
    from keye.train.merge_search import DevSet, search_average

    dev = DevSet([DataSet.parse(text) for text in data], score)
    if dev.skipped:
        inputs.note(f"{dev.skipped} rows of the held-out data cannot be used: keye finetune --check says which")

    def print_trial(trial: Trial) -> None:
        if not quiet:
            shares = ", ".join(f"{weight:.4g}" for weight in trial.weights)
            show.print_line(f"{trial.score:.4f}  {shares}")

    return search_average(average, dev, output, trials=trials, open_model=load, on_trial=print_trial)


def _parse_weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise KeyeError(f"--weights is {text!r}; write a number for each model, as 0.5,0.3,0.2") from None


def _dtype(kind: str) -> Any:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]


def _complete(folder: Path, output: Path, kind: str) -> None:
    """Adds what a model has beside its weights."""
    from keye.commands.shared.outputs import copy_small_files

    copy_small_files(folder, output, {"torch_dtype": str(_dtype(kind)).removeprefix("torch.")})
