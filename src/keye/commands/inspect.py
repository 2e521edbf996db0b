"""`keye inspect`: what a model is made of and where it fits, from its small files; weights are not needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.config import KeyeConfig
    from keye.models.outline import Outline
    from keye.planning.formats import WeightFormat
    from keye.process import Memory

#: Number formats that keye loads weights in, and the bytes of a number.
FORMATS = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Those that weights are quantised to. Keys, values and activations have 16 bits beside them.
QUANTISED: tuple[WeightFormat, ...] = ("int8", "int4")
#: Placeholders and marks of the prompt, and the fields of config.json that hold their ids.
MARKS = {
    "<|image_pad|>": "image_token_id", "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id", "<|vision_end|>": "vision_end_token_id",
}  # fmt: skip
#: Words in a chat template that tell what it knows.
TEMPLATE_WORDS = {"tools": "tools", "thinking": "enable_thinking", "images": "image", "videos": "video"}


@click.command(context_settings=options.CONTEXT)
@click.argument("model", metavar="MODEL", required=False)
@options.mmproj
@click.option("--machines", is_flag=True, help="Print which published model runs on which machine, as Markdown.")
@options.as_json
@options.debug
def inspect(model: str | None, mmproj: Path | None, machines: bool, as_json: bool) -> None:
    """Show what a model is made of, what it costs in memory, and what fits in this machine; or what an index holds.

    MODEL is a name (nano, preview, 1.5, 2.0, 671b), a name on the hub, a folder with config.json, or a GGUF file.
    Weights are neither needed nor fetched; where they are, their headers are read and compared. It may also be an index
    that keye index or keye find wrote. With --machines, and no MODEL, common machines are compared by arithmetic on
    nominal bandwidths.

    \b
    keye inspect nano
    keye inspect 2.0 --json
    keye inspect Keye-VL-2.0-Q4_K_M.gguf
    keye inspect talk.keye
    keye inspect --machines
    """
    from keye.commands.shared import inputs, show, show_model
    from keye.media.source.fetch import fetch_source, is_index

    if machines == (model is not None):
        raise KeyeError("give a MODEL to describe, or --machines, one of the two")
    if model is None:
        from keye.planning.machines import machine_table, markdown_table

        rows = machine_table()
        show.print_json({"machines": rows}) if as_json else print("\n".join(markdown_table(rows)))
        return
    if os.path.isfile(model) and is_index(fetch_source(model)):
        from keye.cache.segments import is_segmented
        from keye.sessions.search.headers import describe_search_index
        from keye.sessions.video_index import describe

        if is_segmented(Path(model)):
            contents = describe_search_index(Path(model))
            show.print_json(contents) if as_json else show.print_search_index(contents)
            return
        header = describe(Path(model))
        show.print_json(header) if as_json else show.print_held(header)
        return
    with inputs.stderr().status("reading"):
        result = description(model, mmproj)
    if as_json:
        show.print_json(result)
    else:
        show_model.print_model(result)


def description(model: str, mmproj: Path | None = None) -> dict[str, Any]:
    """Everything that `keye inspect --json` prints."""
    from keye.commands.shared.inputs import describing_folder
    from keye.config import read_json
    from keye.models.outline import active_parameters, outline, parameters_by_part, read_parameters
    from keye.planning.cards import cards_sentence, cards_to_dict, count_cards
    from keye.planning.machines import read_bandwidth, recommend
    from keye.planning.placement import ModelSizes
    from keye.process import memories
    from keye.weights.names import IGNORED

    folder, packaged = describing_folder(model, mmproj)
    raw = read_json(folder / "config.json")
    model_outline = outline(raw)
    files, shapes, notes = weight_facts(folder, model_outline)
    if packaged:
        notes.append("Not on this machine: described from the configuration that ships with keye, put together from "
                     "what is published; the values in a real checkpoint win.")  # fmt: skip
    if unknown := model_outline.config.unknown:
        notes.append(f"Without meaning to keye in config.json: {', '.join(unknown)}.")
    quantised = None if files is None else files.pop("quantization", None)
    if not shapes:  # a quantised folder leaves out what no forward pass reads
        shapes = {n: s for n, s in model_outline.shapes.items() if quantised is None or not IGNORED.search(n)}
    parts = parameters_by_part(shapes)
    total, read = sum(parts.values()), read_parameters(shapes)
    memory, sizes = memories(), ModelSizes.of(model_outline)
    weights = {name: read * size for name, size in FORMATS.items()}
    weights |= {name: sum(sizes.parts[name].values()) for name in QUANTISED}
    stored = None if files is None else files.pop("stored", None)
    kinds = {quantised["kind"]: files["bytes"]} if files is not None and quantised is not None else weights
    if stored is not None:
        kinds = {"stored": stored}
    cards = count_cards(model_outline)
    if cards:
        notes.append(f"{cards_sentence(cards)}.")
    recommended = (
        None
        if quantised or stored
        else recommend(sizes, memory, {device.device: read_bandwidth(device.device) for device in memory})
    )
    return {
        "model": model, "folder": None if packaged else str(folder), "architecture": model_outline.architecture,
        "release": model_outline.release.name, "text": model_outline.text,
        "vision": asdict(model_outline.vision) if model_outline.config.has_vision else None,
        "tokens_per_second": model_outline.config.tokens_per_second,
        "context": model_outline.context,
        "parameters": {
            "total": total, "read": read, "active": active_parameters(parts, model_outline.experts), "parts": parts,
        },
        "bytes": {**{name: total * size for name, size in FORMATS.items()}, **{n: weights[n] for n in QUANTISED}},
        "kv_bytes_per_token": {name: model_outline.kv_numbers * size for name, size in FORMATS.items()},
        "indexer_bytes_per_token": {
            **{name: model_outline.indexer_numbers * size for name, size in FORMATS.items()},
            "float8": model_outline.indexer_bytes_float8,
        },
        "files": files, "memory": [asdict(device) for device in memory],
        "fits": [fit(model_outline, size, device, name) for device in memory for name, size in kinds.items()],
        "recommendation": recommended, "quantization": quantised, "cards_of_80_gb": cards_to_dict(cards),
        "tokenizer": tokenizer_facts(folder, raw), "template": template_facts(folder),
        "sampling": sampling_facts(folder), "notes": notes,
    }  # fmt: skip


def weight_facts(
    folder: Path, model_outline: Outline
) -> tuple[dict[str, Any] | None, dict[str, tuple[int, ...]], list[str]]:
    """The weight files of a folder as their headers tell: facts, shapes by name, and what is odd about them."""
    import torch

    from keye.models.load import check_fit, loaded_bytes
    from keye.models.quant_fill import stored_policy
    from keye.models.quantize import read_report
    from keye.weights.gguf.folder import read_link
    from keye.weights.open import open_weights
    from keye.weights.safetensors import weight_files

    try:
        if read_link(folder) is None and not weight_files(folder):
            return None, {}, []
        tensors = open_weights(folder)
    except KeyeError as error:
        return None, {}, [f"{error}."]
    files = {tensor.place[0] for tensor in tensors.values()}
    bytes_of: dict[str, int] = {}
    for tensor in tensors.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    facts: dict[str, Any] = {
        "files": len(files), "tensors": len(tensors), "bytes": sum(bytes_of.values()), "bytes_by_dtype": bytes_of,
    }  # fmt: skip
    notes: list[str] = []
    try:
        report = check_fit(tensors, model_outline.config)
    except KeyeError as error:
        facts["fits_config"] = False
        notes.append(f"{str(error)[:400]}.")
    else:
        facts |= {"fits_config": True, "ignored": list(report.ignored), "unused": list(report.unused)}
        formats = {tensor.format.kind for tensor in tensors.values() if tensor.format is not None}
        if stored_policy(model_outline.config) is None and formats:  # a GGUF file, for example
            facts["stored"] = loaded_bytes(folder, model_outline.config, torch.bfloat16)
        if report.lacks_indexer:
            notes.append("The files hold no indexer weights: the model runs with dense attention.")
    if (policy := stored_policy(model_outline.config)) is not None:
        facts["quantization"] = (read_report(folder) or policy).to_dict()
        return facts, {}, notes  # codes do not have the shapes of the matrices
    return facts, {name: tensor.shape for name, tensor in tensors.items()}, notes


def activation_bytes(config: KeyeConfig, itemsize: int) -> int:
    """Bytes of the activations of a long prompt and of a chunk of its frames."""
    from keye.engine.step import prompt_scratch
    from keye.planning.estimate import encoding_bytes

    tokens = config.text.max_position_embeddings
    return prompt_scratch(config.text, tokens, itemsize) + encoding_bytes(config.vision, itemsize)


def fit(model_outline: Outline, weights: int, memory: Memory, dtype: str) -> dict[str, Any]:
    """Whether `weights` bytes in `dtype` fit into the free memory of a device, and the longest context beside them and
    what the engine reserves for activations."""
    size = FORMATS.get(dtype, 2)
    activations = activation_bytes(model_outline.config, size)
    left = memory.free - activations - weights
    tokens = max(0, left) // ((model_outline.kv_numbers + model_outline.indexer_numbers) * size)
    context = min(tokens, model_outline.context)
    limit = None if not context else ("model" if tokens >= model_outline.context else "memory")
    return {"device": memory.device, "dtype": dtype, "weights": weights, "activations": activations,
            "fits": context > 0, "context": context, "limited_by": limit}  # fmt: skip


def tokenizer_facts(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Size and marks of `tokenizer.json`; None without one. `disagreements` are ids that config.json says otherwise."""
    from keye.chat.tokenizer import FRAME_TOKENS, Tokenizer
    from keye.config import architecture_name
    from keye.releases import releases_by_architecture

    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.from_file(folder)
    added = tokenizer.added_tokens
    wrong = [f"{mark} is {added.get(mark)} but {field} is {raw.get(field)}"
             for mark, field in MARKS.items() if added.get(mark) != raw.get(field)]  # fmt: skip
    release = releases_by_architecture()[architecture_name(raw)]
    wrong += [f"{mark} is {added[mark]} but {index} in the official {release.name}"
              for mark, index in release.official_token_ids.items() if added.get(mark, index) != index]  # fmt: skip
    if (rows := raw.get("vocab_size")) is not None and tokenizer.vocab_size > rows:
        wrong.append(f"{tokenizer.vocab_size} tokens but vocab_size {rows}")
    return {
        "tokens": tokenizer.vocab_size, "added": len(added), "special": sorted(tokenizer.special_tokens),
        "ids": {mark: added.get(mark) for mark in MARKS},
        "frame_marks": [token for token in FRAME_TOKENS if token in added], "thinks": "<think>" in added,
        "calls_tools": "<tool_call>" in added, "disagreements": wrong,
    }  # fmt: skip


def template_facts(folder: Path) -> dict[str, Any] | None:
    """Which file holds the checkpoint's chat template and what the template knows; None without one. It is not run."""
    from keye.config import read_json

    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            is_jinja = file.suffix == ".jinja"
            text = file.read_text("utf-8", "replace") if is_jinja else read_json(file).get("chat_template")
            if isinstance(text, str):
                knows = [what for what, word in TEMPLATE_WORDS.items() if word in text]
                return {"file": name, "characters": len(text), "knows": knows}
    return None


def sampling_facts(folder: Path) -> dict[str, Any]:
    """How the model wants to be sampled, and the ids that end a reply, as generation_config.json says."""
    from keye.config import load_generation_config

    config = load_generation_config(folder)
    return {**config.sampling_defaults(), "stop_ids": list(config.eos_token_ids)}
