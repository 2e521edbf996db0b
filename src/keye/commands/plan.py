"""`keye plan`: what a request would sample and cost, without weights and without reading a whole video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError


@click.command(context_settings=options.CONTEXT)
@click.argument("files", nargs=-1)
@click.option("--video", "imagined", metavar="LENGTH[@WxH]",
              help="Plan a hypothetical video: 90s, 2h, 1:30:00, 2h@1920x1080.  [size: 1280x720]")  # fmt: skip
@click.option("--fleet", "fleet_file", metavar="TOML", type=options.PATH,
              help="Also size a fleet of decode nodes and engines for many such videos a day.")  # fmt: skip
@click.option("--device", metavar="DEVICE", help="Also predict memory and time there: cpu, cuda, cuda:1, ...")
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
    files: tuple[str, ...], model: str, as_json: bool, imagined: str | None, fleet_file: Path | None, **arguments: Any
) -> None:
    """Show which frames would be sampled from videos and images and what they cost.

    The plan follows from the files' index and the model's configuration: nothing is decoded and no weights are read.
    With --device, one layer of the model's shapes is timed on this machine for a few seconds, and memory and time of
    the whole request are predicted from that. With --fleet, a file says how many such videos come a day and how soon
    they must be answered; how many nodes that takes, the bytes they move and what they cost is simulated.

    \b
    keye plan video.mp4
    keye plan talk.mp4 --fps 1 --max-frames 64 --json
    keye plan --model 2.0 --video 2h --kv int8 --device cpu
    keye plan --model 2.0 --video 2m --fleet configs/fleet.toml
    """
    from keye.commands.shared import inputs, show
    from keye.config import load_model_config, load_processor_config
    from keye.config.media import media_options
    from keye.media.plan import make_plan
    from keye.media.source.fetch import is_index
    from keye.models.outline import outline
    from keye.planning.cards import cards_sentence, cards_to_dict, count_cards
    from keye.planning.question import Planned, imagine_video, plan_media, predict

    if bool(files) == bool(imagined):
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
    if cards := count_cards(outline(model_config.raw)):
        result |= {"cards_of_80_gb": cards_to_dict(cards), "needs": cards_sentence(cards)}
    if arguments["device"] is not None:
        result["prediction"] = predict(model_config, config, folder, planned, arguments)
    if fleet_file is not None:
        from keye.planning.fleet_file import plan_fleet

        result["fleet"] = plan_fleet(fleet_file, planned, result.get("prediction"))
    if as_json:
        show.print_json(result)
        return
    show.print_plans(result)
    if fleet_file is not None:
        print_fleet(result["fleet"])


def summary(planned: Sequence[Any], context: int, model: str) -> dict[str, Any]:
    """The plans and their share of the model's context, as plain data."""
    plans: list[Mapping[str, Any]] = [{"kind": item.kind, **item.plan.to_dict()} for item in planned]
    total = sum(item.plan.visual_tokens for item in planned)
    return {
        "media": plans, "visual_tokens": total, "context": context, "share_of_context": round(total / context, 6),
        "model": model,
    }  # fmt: skip


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
