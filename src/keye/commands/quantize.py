"""`keye quantize`: a checkpoint to one of a quarter or half of its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from keye.commands.shared import options
from keye.errors import KeyeError

if TYPE_CHECKING:
    from torch import Tensor

    from keye.config import KeyeConfig

_MIB = 1 << 20


@click.command(context_settings=options.CONTEXT)
@click.argument("model", metavar="MODEL")
@click.option("--to", "kind", type=click.Choice(["int4", "int8", "fp8"]), required=True,
              help="int4 is a quarter of the size, int8 half of it; fp8 is for GPUs.")  # fmt: skip
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR", help="The folder to write.")
@click.option("--group", type=options.COUNT, metavar="N",
              help="Inputs that share a scale: 32, 64 or 128 in int4.  [default: 64, else the row]")  # fmt: skip
@click.option("--part", "parts", multiple=True, metavar="PART=FORMAT",
              help="Format of one part, as head=int8, experts=int4:32 or indexer=keep; may be repeated.")  # fmt: skip
@click.option("--data-aware", "prompts", metavar="frameforge|FILE|DIR",
              help="Answer prompts first and weigh errors by what the matrices meet: generated clips, a file with a "
                   "question a line, a manifest of keye batch, or a folder of media.")  # fmt: skip
@click.option("--threads", type=options.COUNT, metavar="N", help="Processor threads for --data-aware.")
@options.mmproj
@options.overwrite
@options.as_json
@options.debug
def quantize(
    model: str, kind: str, output: Path, group: int | None, parts: tuple[str, ...], prompts: str | None,
    threads: int | None, mmproj: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a model with weights of 4 or 8 bits to a new folder, which every command takes as a model.

    The checkpoint is read and written tensor by tensor: 4 GiB of memory are enough for any model without --data-aware.
    After a kill the same command resumes. The vision tower, projector and indexer are int8 also in int4; norms and the
    router stay as they are. A table of parts, formats and errors is printed, and kept in quantization.json.

    \b
    keye quantize 2.0 --to int4 -o keye-2.0-int4
    keye quantize 1.5 --to int4 --group 32 --part head=int8 -o keye-1.5-int4
    keye quantize nano --to int4 --data-aware frameforge -o nano-int4
    """
    from keye.commands.shared import inputs, show
    from keye.commands.shared.show_quant import print_quant_report
    from keye.config import load_model_config
    from keye.models.quantize import check_new_folder, quantize_checkpoint
    from keye.quant.policy import make_policy, parse_part

    policy = make_policy(kind, group, dict(map(parse_part, parts)))
    check_new_folder(output, overwrite=overwrite)
    load_model_config(inputs.find_model(model, mmproj, weights=False))  # what cannot be read is not downloaded
    folder = inputs.find_model(model, mmproj)
    config = load_model_config(folder)
    calibrate = None if prompts is None else _calibration(model, mmproj, folder, config, prompts, threads)
    with show.progress_bar("quantising (MiB)", notes=True) as advance:
        report = quantize_checkpoint(
            folder, config, output, policy, calibrate=calibrate, calibration=prompts, overwrite=overwrite,
            on_progress=lambda done, total: advance(done // _MIB, total // _MIB),
        )  # fmt: skip
    if as_json:
        show.print_json({"folder": str(output), **report.to_dict()})
    else:
        print_quant_report(report.to_dict())
        show.print_line(f"{output} is complete; every command takes it as --model")


def _calibration(
    model: str, mmproj: Path | None, folder: Path, config: KeyeConfig, prompts: str, threads: int | None
) -> Callable[[], Mapping[str, Tensor]]:
    """Has the model answer prompts; one that does not fit the free memory answers them in int4."""
    from keye.evals.health.calibration import measure_importance, read_prompts

    conversations = read_prompts(prompts)

    def calibrate() -> Mapping[str, Tensor]:
        from keye.cache.slabs import free_memory
        from keye.commands.shared import inputs, show
        from keye.weights.open import open_weights

        files = {Path(tensor.place[0]) for tensor in open_weights(folder).values()}
        needed = sum(file.stat().st_size for file in files)
        free = free_memory("cpu")
        quant = "int4" if free is not None and needed > 0.8 * free else None
        arguments = {
            "model": model,
            "mmproj": mmproj,
            "device": "cpu",
            "dtype": None,
            "threads": threads,
            "quant": quant,
        }
        loaded = inputs.load_model(arguments)
        with show.progress_bar("answering prompts", notes=True) as advance:
            counts = measure_importance(loaded, conversations, advance)
        if not counts:
            raise KeyeError("the prompts were not answered: give others with --data-aware")
        return counts

    return calibrate
