"""How `keye inspect` looks: a headline and a few plain tables that fold on narrow terminals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keye.commands.shared.show import stdout
from keye.commands.shared.show_quant import quant_table
from keye.releases import find_release
from keye.units import format_bytes, format_count, listed, one_line, plural

#: Cells of the bar that shows the share of a part, and the terminal width below which there is none.
BAR, NARROW = 20, 64
#: Formats of the same size share a row.
ROWS = {"bfloat16": "16-bit", "float32": "32-bit", "int8": "int8", "int4": "int4"}
_FIT_ROWS = {**ROWS, "fp8": "fp8", "stored": "as stored"}


def print_model(result: Mapping[str, Any]) -> None:
    """The description that `commands.inspect.description` makes."""
    console = stdout()
    console.print(headline(result))
    section(console, "architecture", pairs(architecture_rows(result)))
    section(console, "parameters", parameter_table(result["parameters"], console.width >= NARROW))
    section(console, "memory", memory_table(result))
    section(console, "this machine", pairs(machine_rows(result)))
    if (quantised := result["quantization"]) is not None and "rows" in quantised:
        section(console, f"quantised to {quantised['kind']}", quant_table(quantised))
    elif quantised is not None:
        formats = quantised["parts"].items()
        section(console, f"quantised to {quantised['kind']}",
                pairs((part, "as it is" if form is None else form["kind"]) for part, form in formats))  # fmt: skip
    section(console, "files", pairs(file_rows(result)))
    for note in result["notes"]:
        console.print(Text(one_line(note), style="yellow"))


def headline(result: Mapping[str, Any]) -> Text:
    parameters = result["parameters"]
    text = Text(one_line(result["model"]), style="bold")
    text.append(f"  {one_line(result['architecture'])}", style="not bold")
    text.append(f"\n{format_count(parameters['total'])} parameters", style="not bold")
    if parameters["parts"].get("experts"):
        text.append(f", {format_count(parameters['active'])} of the decoder at work on a token", style="not bold")
    return text


def section(console: Console, title: str, body: Table) -> None:
    if not body.row_count:
        return
    console.print()
    console.print(Text(title, style="bold cyan"))
    console.print(body)


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and what is to be said of them; long text folds beside its name."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=False, overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for name, text in rows:
        table.add_row(name, one_line(text))
    return table


# Rows


def architecture_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    text, vision = result["text"], result["vision"]
    rows = [("release", result["release"])]
    rows += _latent_rows(text) if text["latent"] is not None else _decoder_rows(text)
    rows += [("context", f"{result['context']:,} tokens"), ("vocabulary", f"{text['vocab_size']:,}")]
    if vision is None:
        return [*rows, ("vision tower", "none: the model answers text")]
    rows += [
        ("vision tower", f"{vision['num_hidden_layers']} layers, width {vision['hidden_size']:,}, "
                         f"{vision['num_attention_heads']} heads; patches of {vision['patch_size']} pixels"),
        ("vision sees", "all frames of a video at once" if vision["whole_video_attention"] else "each frame by itself"),
        ("projector", f"{vision['spatial_merge_size']}x{vision['spatial_merge_size']} patches to a token, norm "
                      f"{'before' if vision['norm_before_merge'] else 'after'} the merge"),
    ]  # fmt: skip
    if result["tokens_per_second"] is not None:
        rows.append(("time of frames", f"in the positions, {result['tokens_per_second']:g} steps a second"))
    else:
        rows.append(("time of frames", "in words before each frame"))
    return rows


def _decoder_rows(text: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("decoder", f"{text['num_hidden_layers']} layers, width {text['hidden_size']:,}; "
                        f"{text['num_attention_heads']} query and {text['num_key_value_heads']} key/value heads "
                        f"of {text['head_dim']}")]  # fmt: skip
    if text["num_experts"]:
        rows.append(("experts", f"{text['num_experts_per_tok']} of {text['num_experts']} for each token, "
                                f"width {text['moe_intermediate_size']:,}"))  # fmt: skip
    else:
        rows.append(("feed-forward", f"dense, width {text['intermediate_size']:,}"))
    attention = "dense"
    if (sparse := text["sparse"]) is not None:
        attention = (f"sparse: {sparse['indexer_num_heads']} indexer heads of {sparse['indexer_head_dim']} choose "
                     f"{sparse['topk']:,} keys")  # fmt: skip
    rows.append(("attention", attention))
    sections = "/".join(map(str, text["mrope_section"]))
    rows.append(("rotary", f"base {text['rope_theta']:,.0f}; time/row/column {sections}"))
    return rows


def _latent_rows(text: Mapping[str, Any]) -> list[tuple[str, str]]:
    latent, routing, yarn = text["latent"], text["group_routing"], text["yarn"]
    dense = len(text["mlp_only_layers"])
    stretched = f"; stretched {yarn['factor']:g}-fold (yarn)" if yarn is not None else ""
    sections = "/".join(map(str, text["mrope_section"])) if text["uses_mrope"] else ""
    return [
        ("decoder", f"{text['num_hidden_layers']} layers, width {text['hidden_size']:,}; "
                    f"{text['num_attention_heads']} heads"),
        ("experts", f"{text['num_experts_per_tok']} of {text['num_experts']} for each token, from "
                    f"{routing['topk_group']} of {routing['n_group']} groups, and {text['n_shared_experts']} shared, "
                    f"width {text['moe_intermediate_size']:,}; the first {dense} layers are dense"),
        ("attention", f"latent: {latent['kv_lora_rank']} numbers and a rotary key of {latent['qk_rope_head_dim']} "
                      "for each token and layer"),
        ("rotary", f"base {text['rope_theta']:,.0f}{stretched}; "
                   + (f"time/row/column {sections}" if sections else "one position a token, visual ones too")),
    ]  # fmt: skip


def parameter_table(parameters: Mapping[str, Any], bars: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    if bars:
        table.add_column(no_wrap=True)
    total = parameters["total"]
    for part, numbers in parameters["parts"].items():
        bar = [Text("█" * round(BAR * numbers / total), style="cyan")] if bars else []
        table.add_row(part, f"{numbers:,}", f"{numbers / total:.1%}", *bar)
    table.add_row("total", Text(f"{total:,}", style="bold"))
    return table


def memory_table(result: Mapping[str, Any]) -> Table:
    """Bytes of weights and of one token of context in each format."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", style="dim", overflow="fold")
    for name in ("weights", "K/V a token", "indexer a token"):
        table.add_column(name, justify="right", overflow="fold")
    kv, index = result["kv_bytes_per_token"], result["indexer_bytes_per_token"]
    for dtype, name in ROWS.items():
        cached = (f"{kv[dtype]:,} B", _bytes(index[dtype])) if dtype in kv else ("", "")
        table.add_row(name, format_bytes(result["bytes"][dtype]), *cached)
    if index["float8"]:
        table.add_row("8-bit (official server)", "", "", _bytes(index["float8"]))
    return table


def machine_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each device and format, whether the model fits and how much context beside it."""
    rows = []
    for memory in result["memory"]:
        device = memory["device"]
        rows.append((device, f"{format_bytes(memory['free'])} of {format_bytes(memory['total'])} free"))
        for fit in result["fits"]:
            if fit["device"] == device and fit["dtype"] in _FIT_ROWS:
                verdict = f"does not fit: the weights take {format_bytes(fit['weights'])}"
                if fit["fits"]:
                    full = ", all that the model knows" if fit["limited_by"] == "model" else ""
                    verdict = f"fits with {fit['context']:,} tokens of context{full}"
                rows.append((f"  {_FIT_ROWS[fit['dtype']]}", verdict))
    if result["quantization"] is not None or any(fit["dtype"] == "stored" for fit in result["fits"]):
        return rows
    if (recommended := result["recommendation"]) is not None:
        rows.append(("recommended", f"{recommended['sentence']} on {recommended['device']}"))
        rows.append(("", " ".join(("keye serve", result["model"], *recommended["options"]))))
    else:
        rows.append(("recommended", "no format of this model runs here: keye inspect --machines shows what it needs"))
    return rows


def file_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    needs_template = find_release(result["release"]).needs_template
    files, tokenizer, template = result["files"], result["tokenizer"], result["template"]
    rows = []
    if files is None:
        rows.append(("weights", "none here"))
    else:
        formats = ", ".join(sorted(files["bytes_by_dtype"]))
        rows.append(("weights", f"{files['tensors']:,} tensors in {plural(files['files'], 'file')}, "
                                f"{format_bytes(files['bytes'])} of {formats}" + _verdict(files)))  # fmt: skip
        if left := [*files.get("ignored", ()), *files.get("unused", ())]:
            rows.append(("not used", listed(left)))
    if tokenizer is None:
        rows.append(("tokenizer", "none here"))
    else:
        rows.append(("tokenizer", f"{tokenizer['tokens']:,} tokens, {tokenizer['added']} of them added"))
        marks = [*tokenizer["frame_marks"], *(["<think>"] if tokenizer["thinks"] else []),
                 *(["<tool_call>"] if tokenizer["calls_tools"] else [])]  # fmt: skip
        rows.append(("marks", ", ".join(marks) or "none of frames, thinking or tools"))
        if tokenizer["disagreements"]:
            rows.append(("disagrees", "; ".join(tokenizer["disagreements"])))
    if template is None:
        rows.append(
            ("template", "none here: " + ("it must come with the checkpoint" if needs_template else "keye's own"))
        )
    else:
        rows.append(("template", f"{template['file']}, {template['characters']:,} characters; "
                                 f"knows {', '.join(template['knows']) or 'text only'}"))  # fmt: skip
    sampling = {name: value for name, value in result["sampling"].items() if value not in (None, [])}
    if sampling:
        rows.append(("sampling", ", ".join(f"{name} {_plain(value)}" for name, value in sampling.items())))
    return rows


def _verdict(files: Mapping[str, Any]) -> str:
    return {True: "; they fit config.json", False: "; they do not fit config.json", None: ""}[files.get("fits_config")]


# Words


def _bytes(number: int) -> str:
    return f"{number:,} B" if number else "none"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
