"""`keye plan`: what a request would sample and cost, without a model and without decoding."""

from __future__ import annotations

from typing import Any

import click

from keye.commands import options


@click.command(context_settings=options.CONTEXT)
@click.argument("files", nargs=-1, required=True)
@options.sampling_frames
@options.model_name
@options.as_json
@options.debug
def plan(files: tuple[str, ...], model: str, as_json: bool, **given: Any) -> None:
    """Show which frames would be sampled from videos and images and what they cost.

    Nothing is decoded and no weights are read: the plan follows from the files' index and the model's configuration.

    \b
    keye plan video.mp4
    keye plan talk.mp4 --fps 1 --max-frames 64 --json
    """
    from keye.commands import inputs, show
    from keye.config import load_model_config, load_processor_config
    from keye.media.image import plan_image
    from keye.media.options import media_options
    from keye.media.video import plan_video

    media = inputs.open_media(files, given)
    folder = inputs.find_model(model, weights=False)
    config, context = load_processor_config(folder), load_model_config(folder).text.max_position_embeddings
    videos = sum(medium.kind == "video" for medium in media)
    plans: list[dict[str, Any]] = []
    for medium in media:
        source: Any = medium.source
        settings = media_options(medium.kind, medium.options, video_count=max(videos, 1))
        made = plan_image(source, config, settings) if medium.kind == "image" else plan_video(source, config, settings)
        plans.append({"kind": medium.kind, **made.to_dict()})
    total = sum(item["visual_tokens"] for item in plans)
    result = {"media": plans, "visual_tokens": total, "context": context, "share_of_context": round(total / context, 6),
              "model": model}  # fmt: skip
    if as_json:
        show.print_json(result)
    else:
        show.print_plans(result)
