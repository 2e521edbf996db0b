"""`keye plan`: what a request would sample and cost, without weights and without reading a whole video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.planning.placement import Hardware


@click.command(context_settings=options.CONTEXT)
@click.argument("files", nargs=-1)
@click.option("--video", "imagined", metavar="LENGTH[@WxH]",
              help="Plan a hypothetical video: 90s, 2h, 1:30:00, 2h@1920x1080.  [size: 1280x720]")  # fmt: skip
@click.option("--fleet", "fleet_file", metavar="TOML", type=options.PATH,
              help="Also size a fleet of decode nodes and engines for many such videos a day.")  # fmt: skip
@click.option("--device", metavar="DEVICE", help="Also predict memory and time there: cpu, cuda, cuda:1, ...")
@click.option(
    "--gpu", type=options.Bytes(), metavar="SIZE", help="Plan for a machine with a GPU of this size, as 12GiB."
)
@click.option("--ram", type=options.Bytes(), metavar="SIZE", help="The same: its main memory.  [default: 32GiB]")
@click.option("--mac", type=options.Bytes(), metavar="SIZE", help="Plan for a Mac with so much memory.")
@click.option("--weights", type=click.Choice(["bf16", "int8", "int4"]),
              help="Format of the weights there.  [default: the best that fits]")  # fmt: skip
@click.option("--context", "context_tokens", type=options.COUNT, metavar="N",
              help="Tokens of context there.  [default: the planned media, or 8192]")  # fmt: skip
@click.option("--bandwidth", metavar="GPU,RAM,DISK",
              help="GB/s of each there, - for the usual.  [default: those of common products]")  # fmt: skip
@options.kv_format
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Number format of the weights.")
@click.option("--threads", type=options.COUNT, metavar="N", help="Processor threads for the model.")
@click.option("--max-tokens", type=options.COUNT, default=128, show_default=True, metavar="N",
              help="Length of the reply.")  # fmt: skip
@options.attention
@options.sampling_frames
@options.model_name
@options.mmproj
@options.as_json
@options.debug
def plan(
    files: tuple[str, ...], model: str, as_json: bool, imagined: str | None, fleet_file: Path | None, gpu: int | None,
    ram: int | None, mac: int | None, weights: str | None, context_tokens: int | None, bandwidth: str | None,
    **arguments: Any,
) -> int:  # fmt: skip
    """Show which frames would be sampled from videos and images and what they cost.

    The plan follows from the files' index and the model's configuration: nothing is decoded and no weights are read.
    With --device, one layer of the model's shapes is timed on this machine for a few seconds, and memory and time of
    the whole request are predicted from that. With --fleet, a file says how many such videos come a day and how soon
    they must be answered; how many nodes that takes, the bytes they move and what they cost is simulated.

    With --gpu, --ram or --mac, and media or none, the place of the weights on such a machine is planned, and the rate
    at which it generates: experts that do not fit a GPU lie in main memory, those that do not fit that on disk. Exit
    code 1 where the model does not fit or would be too slow.

    \b
    keye plan video.mp4
    keye plan talk.mp4 --fps 1 --max-frames 64 --json
    keye plan --model 2.0 --video 2h --kv int8 --device cpu
    keye plan --model 2.0 --video 2m --fleet configs/fleet.toml
    keye plan --model 2.0 --gpu 12GiB --ram 32GiB
    """
    from keye.commands.shared import inputs, show
    from keye.config import load_model_config, load_processor_config
    from keye.config.media import media_options
    from keye.media.plan import make_plan
    from keye.media.source.fetch import is_index
    from keye.planning.question import Planned, imagine_video, plan_media, predict

    machine = machine_of(gpu, ram, mac, bandwidth)
    if machine is None and (weights is not None or context_tokens is not None or bandwidth is not None):
        raise KeyeError("--weights, --context and --bandwidth are about a machine: give --gpu, --ram or --mac")
    if (files and imagined) or not (files or imagined or machine):
        raise KeyeError("give FILES to plan, or a length with --video, one of the two")
    unused = [options.flag(name) for name in ("kv", "dtype", "threads", "attention") if arguments[name] is not None]
    if unused and arguments["device"] is None:
        raise KeyeError(f"{', '.join(unused)} changes memory and time, which need --device, as in --device cpu")
    media = inputs.open_media(files, {**arguments, "kv": None})
    for medium in media:
        if is_index(medium.source):  # type: ignore[arg-type]
            raise KeyeError(f"{medium.source.name} is an index, computed already: keye inspect shows it")  # type: ignore[attr-defined]
    folder, _ = inputs.describing_folder(model, arguments["mmproj"])
    config, model_config = load_processor_config(folder), load_model_config(folder)
    context = model_config.text.max_position_embeddings
    planned: list[Planned] = []
    if imagined is not None:
        settings = media_options("video", options.pick_set(arguments, options.VIDEO_OPTIONS), video_count=1)
        planned.append(Planned("video", None, make_plan(imagine_video(imagined), config, settings)))
    planned += plan_media(media, config)
    result = summary(planned, context, model)
    if model_config.text.latent is not None:  # the release that no single GPU holds; counting imports torch
        from keye.models.outline import outline
        from keye.planning.cards import cards_sentence, cards_to_dict, count_cards

        cards = count_cards(outline(model_config.raw))
        result |= {"cards_of_80_gb": cards_to_dict(cards), "needs": cards_sentence(cards)} if cards else {}
    if machine is not None:
        result["placement"] = placement(model, folder, machine, weights, context_tokens or result["visual_tokens"])
    if arguments["device"] is not None:
        result["prediction"] = predict(model_config, config, folder, planned, arguments)
    if fleet_file is not None:
        from keye.planning.fleet_file import plan_fleet

        result["fleet"] = plan_fleet(fleet_file, planned, result.get("prediction"))
    fails = machine is not None and result["placement"]["refusal"] is not None
    if as_json:
        show.print_json(result)
        return int(fails)
    if planned:
        show.print_plans(result)
    if machine is not None:
        print_placement(result["placement"])
        if not planned and "needs" in result:
            show.stdout().print(f"{result['needs']}.", soft_wrap=True, highlight=False)
    if fleet_file is not None:
        print_fleet(result["fleet"])
    return int(fails)


def summary(planned: Sequence[Any], context: int, model: str) -> dict[str, Any]:
    """The plans and their share of the model's context, as plain data."""
    plans: list[Mapping[str, Any]] = [{"kind": item.kind, **item.plan.to_dict()} for item in planned]
    total = sum(item.plan.visual_tokens for item in planned)
    return {
        "media": plans, "visual_tokens": total, "context": context, "share_of_context": round(total / context, 6),
        "model": model,
    }  # fmt: skip


def machine_of(gpu: int | None, ram: int | None, mac: int | None, bandwidth: str | None) -> Hardware | None:
    """The machine that is asked about; None where none is."""
    if gpu is None and ram is None and mac is None:
        return None
    if mac is not None and (gpu is not None or ram is not None):
        raise KeyeError("--mac is the memory of the whole Mac: leave --gpu and --ram out")
    from keye.planning.machines import HOST_MEMORY, nominal_bandwidth
    from keye.planning.placement import CARDS, DDR5, MACS, Hardware

    usual = [nominal_bandwidth(gpu or 0, CARDS), DDR5 if mac is None else nominal_bandwidth(mac, MACS), 3e9]
    parts = (bandwidth or "-").split(",")
    try:
        given_rates = [None if part.strip() == "-" else float(part) for part in parts]
    except ValueError:
        given_rates = [-1.0]
    if len(given_rates) > 3 or any(rate is not None and not 0 < rate < 1e6 for rate in given_rates):
        raise KeyeError(f"--bandwidth is {bandwidth!r}; write GB/s of GPU, main memory and disk, as 504,89.6,3")
    rates = [usual_rate if rate is None else 1e9 * rate for rate, usual_rate in zip_longest(given_rates, usual)]
    memory = mac or ram or HOST_MEMORY
    return Hardware("a Mac" if mac else "a machine", memory, rates[1], gpu or 0, rates[0], rates[2], unified=bool(mac))


def placement(model: str, folder: Path, machine: Hardware, weights: str | None, context: int) -> dict[str, Any]:
    """Where the weights lie and what that makes, as plain data."""
    from keye.config import read_json
    from keye.models.outline import outline
    from keye.planning.machines import TABLE_CONTEXT, choose_format
    from keye.planning.placement import ModelSizes, largest_context, place

    sizes = ModelSizes.of(outline(read_json(folder / "config.json")))
    context = min(context or TABLE_CONTEXT, sizes.context)
    choice = None if weights else choose_format(sizes, machine)
    chosen: Any = weights or (choice[0].weights if choice else "int4")
    placed = place(sizes, machine, chosen, context)
    return {
        **placed.to_dict(), "model": model, "bandwidth": [machine.card_bandwidth, machine.memory_bandwidth,
                                                          machine.disk_bandwidth],
        "sizes": [machine.card, machine.memory], "whole": placed.is_whole,
        "largest_context": largest_context(sizes, machine, chosen, one_memory=placed.is_whole),
    }  # fmt: skip


def print_placement(result: Mapping[str, Any]) -> None:
    """The placement as text."""
    from keye.commands.shared.show import stdout
    from keye.units import format_bytes, one_line

    console = stdout()
    if result["refusal"] is not None:
        console.print(one_line(f"{result['model']}: {result['refusal']}"), style="yellow", soft_wrap=True)
        return
    names = {"card": "GPU", "memory": "memory", "disk": "disk"}
    lines = [f"{one_line(result['model'])} in {result['weights']} with {result['context']:,} tokens of context:"]
    for (where, name), rate in zip(names.items(), result["bandwidth"], strict=True):
        if result[where]:
            share = result["experts"].get(where)
            experts = f", {share:.0%} of the experts" if share is not None else ""
            read = f"a token reads {format_bytes(result['read'][where])} at {rate / 1e9:g} GB/s"
            lines.append(f"  {name:<9} {format_bytes(result[where])}{experts}; {read}")
    lines.append(f"  at most   {result['tokens_per_second']:.3g} tokens a second, {result['largest_context']:,} tokens "
                 "of context")  # fmt: skip
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    if result["disk"] and not result["card"]:
        console.print(f"Run it so: keye serve {one_line(result['model'])} --quant {result['weights']} --experts disk",
                      soft_wrap=True, highlight=False)  # fmt: skip
    if result["card"] and not result["whole"]:
        console.print("Planned, not run: keye runs a model on one device.", style="yellow", soft_wrap=True)


def print_fleet(result: Mapping[str, Any]) -> None:
    """The plan of a fleet as text."""
    from keye.commands.shared.show import stdout
    from keye.units import format_bytes, one_line

    console = stdout()
    seconds, busy, moved = result["seconds"], result["busy"], result["bytes_per_second"]
    lines = (
        "",
        f"At {result['videos_per_second']:.3g} videos a second, the busiest hour:",
        f"  decode    {result['decode_workers']} workers on {result['decode_nodes']} nodes, busy {busy['decode']:.0%}",
        f"  engines   {result['engines']} on {result['engine_nodes']} nodes, "
        f"{result['requests_at_once']} requests at once in each, at work {busy['engine']:.0%} of the time",
        f"  answers   median {seconds['median']:.3g} s after the video, p95 {seconds['p95']:.3g} s "
        f"(wanted: {seconds['goal']:g} s)",
        f"  network   {format_bytes(round(moved['to_decoders']))}/s to the decoders, "
        f"{format_bytes(round(moved['to_engines']))}/s to the engines",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    if result["price_per_day"]:
        console.print(
            f"  price     {result['price_per_day']:,.2f} a day, {result['price_per_video']:.2g} a video",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    for note in result["notes"]:
        console.print(one_line(note), style="yellow", soft_wrap=True)
