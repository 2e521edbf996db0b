"""`keye convert`: a model as GGUF, and a GGUF file as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.units import format_bytes

#: Numbers that one unit of the progress bar stands for.
_MILLION = 1_000_000
#: From so many numbers on progress is also noted where standard error is not a terminal.
_LARGE = 200 * _MILLION
_FORMATS = ("gguf", "safetensors")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q3_K_M")


@click.command(context_settings=options.CONTEXT)
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="FILE",
              help="The .gguf file to write, or the folder of a checkpoint in safetensors.")  # fmt: skip
@click.option("--to", "target", type=click.Choice(_FORMATS), help="What to write.  [default: as the output is called]")
@click.option("--type", "kind", type=click.Choice(_TYPES, case_sensitive=False),
              help="Number format.  [default: Q4_K_M; of a vision part F16, in safetensors BF16]")  # fmt: skip
@click.option(
    "--mmproj", "vision", is_flag=True, help="Write the vision part, which belongs beside the language model."
)
@click.option("--text-only", is_flag=True, help="Write 2.0 without its indexer, as a file that every llama.cpp runs.")
@options.overwrite
@options.as_json
@options.debug
def convert(
    model: str, output: Path, target: str | None, kind: str | None, vision: bool, text_only: bool, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a model as GGUF, or as a folder of safetensors.

    A model with vision takes two GGUF files: its language model, and its vision part, whose name must contain mmproj
    where keye is to find it beside the other; MODEL may be such a pair, named by the first. Weights are read and
    written piece by piece; one to GGUF that was interrupted is continued when it is started again. Quantised files
    become plain numbers in safetensors.

    \b
    keye convert 1.5 -o keye-1.5-Q4_K_M.gguf
    keye convert 1.5 --mmproj --type Q8_0 -o mmproj-keye-1.5-Q8_0.gguf
    keye convert 2.0 --text-only --type Q8_0 -o keye-2.0-text.gguf
    keye convert keye-1.5-Q4_K_M.gguf --to safetensors -o keye-1.5
    """
    from keye.commands.shared import inputs, show

    target = target or ("gguf" if output.suffix.lower() == ".gguf" else "safetensors")
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise KeyeError(f"{output} is the input itself: give -o another name")
    if target == "gguf":
        _check_file(output, overwrite)
    else:
        _check_folder(output, overwrite, vision=vision, text_only=text_only)
    folder = inputs.find_model(model)
    with show.progress_bar("converting, million weights", notes=True) as advance:

        def report(done: int, total: int) -> None:
            if total >= _LARGE or inputs.stderr().is_terminal:
                advance(done // _MILLION, max(1, total // _MILLION))

        if target == "gguf":
            result = _write_gguf(model, folder, output, kind, vision, text_only, report)
        else:
            result = _write_folder(folder, output, kind, report)
    if as_json:
        show.print_json(result)
    else:
        inputs.note(f"{output}: {format_bytes(result['bytes'])}, {result['type']}")


def _check_file(output: Path, overwrite: bool) -> None:
    from keye.files import check_output
    from keye.weights.export import is_own

    if output.suffix.lower() != ".gguf":
        raise KeyeError(f"{output} is not called as a GGUF file: end it in .gguf, or give --to safetensors")
    check_output(output, is_own, overwrite=overwrite)


def _check_folder(output: Path, overwrite: bool, *, vision: bool, text_only: bool) -> None:
    if vision or text_only:
        raise KeyeError("--mmproj and --text-only concern GGUF files: leave them out, or end the output in .gguf")
    if output.exists() and not output.is_dir():
        raise KeyeError(f"{output} is a file: name a folder for safetensors")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise KeyeError(f"{output} is not empty: name another folder, or give --overwrite")


def _write_gguf(
    model: str, folder: Path, output: Path, kind: str | None, vision: bool, text_only: bool, report: Any
) -> dict[str, Any]:
    from keye.commands.shared.inputs import note
    from keye.weights.export import export_text, export_vision

    if vision and text_only:
        raise KeyeError("--mmproj and --text-only exclude each other: a text alone has no vision part")
    is_quantised = _check_model(folder)
    name = Path(model).name if Path(model).exists() else model
    kind = kind or ("F16" if vision else "Q4_K_M")
    if is_quantised and kind.startswith("Q"):
        note(f"the weights are quantised already, and {kind} loses more: convert the model that they were made of")
    if vision:
        export_vision(folder, output, kind, name=name, on_progress=report)
    else:
        export_text(folder, output, kind, name=name, text_only=text_only, on_progress=report)
    return {"output": str(output), "type": kind, "part": "vision" if vision else "text", "bytes": output.stat().st_size}


def _check_model(folder: Path) -> bool:
    """An error that names every tensor that is missing or does not fit, before anything is written. Returns whether
    weights are quantised."""
    from keye.config import load_model_config
    from keye.models.load import check_fit
    from keye.models.quant_fill import stored_policy
    from keye.weights.open import open_weights

    config, tensors = load_model_config(folder), open_weights(folder)
    check_fit(tensors, config)
    return stored_policy(config) is not None or any(tensor.format is not None for tensor in tensors.values())


def _write_folder(folder: Path, output: Path, kind: str | None, report: Any) -> dict[str, Any]:
    import torch

    from keye.commands.shared.outputs import copy_small_files
    from keye.files import unwritable
    from keye.weights.coded import open_plain
    from keye.weights.plain import write_plain

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kind = kind or "BF16"
    if kind not in dtypes:
        raise KeyeError(f"--type {kind} is a format of GGUF files; safetensors take {', '.join(dtypes)}")
    _check_model(folder)
    try:
        write_plain(open_plain(folder), output, dtypes[kind], report)
        copy_small_files(folder, output, {"torch_dtype": str(dtypes[kind]).removeprefix("torch.")})
        size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    except OSError as error:
        raise unwritable(output, error) from None
    return {"output": str(output), "type": kind, "part": "model", "bytes": size}
