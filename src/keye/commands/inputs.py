"""What commands start with: the media that the user named, and the model. Notes and progress go to standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from keye.chat import Medium
from keye.commands.options import IMAGE_OPTIONS, SAMPLING_OPTIONS, VIDEO_OPTIONS, given
from keye.commands.terminal import one_line
from keye.errors import KeyeError
from keye.media.download import FetchLimits
from keye.media.fetch import fetch_source, media_kind

if TYPE_CHECKING:
    from keye.engine.engine import Keye


def stderr() -> Console:
    """A console for progress and notes."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def note(sentence: str) -> None:
    """Tells something beside the answer."""
    stderr().print(f"keye: {one_line(sentence)}", style="dim")


def open_media(files: Sequence[str], options: Mapping[str, Any]) -> list[Medium]:
    """The named files as media, each with those options that its kind knows; http addresses are downloaded. Raises
    `MediaError` for a file that cannot be read; nothing is decoded yet."""
    media = []
    limits = FetchLimits(allow_private=bool(options.get("allow_private_urls")))
    for file in files:
        source = fetch_source(file, limits=limits)
        if media_kind(source) == "image":
            media.append(Medium("image", source, given(options, IMAGE_OPTIONS)))
        else:
            media.append(Medium("video", source, given(options, VIDEO_OPTIONS)))
    unused = given(options, VIDEO_OPTIONS).keys() - {name for medium in media for name in medium.options}
    if unused:
        names = ", ".join(sorted(flag(name) for name in unused))
        note(f"{names} has no effect on images")
    return media


def load_model(options: Mapping[str, Any]) -> Keye:
    """Loads the model of `options.running`."""
    with stderr().status(f"loading {one_line(options['model'])}"):
        import torch

        import keye

        if options["threads"]:
            torch.set_num_threads(options["threads"])
        return keye.load(options["model"], device=options["device"], dtype=options["dtype"])


def reply_options(model: Keye, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `Keye.stream`; says which of them will have no effect."""
    sampling = given(options, SAMPLING_OPTIONS)
    if model.sampling_params(**sampling).temperature == 0:
        unused = [flag(name) for name in ("top_p", "top_k", "min_p", "seed") if name in sampling]
        if unused:
            note(f"{', '.join(unused)} has no effect at temperature 0")
    return {**sampling, "thinking": options["thinking"], "attention": options["attention"]}


def flag(name: str) -> str:
    """The option of the command line that sets `name`."""
    return "--" + name.removeprefix("video_").replace("_", "-")


def only_video(file: str, options: Mapping[str, Any]) -> Medium:
    """The one video of a command that takes no images."""
    (medium,) = open_media([file], options)
    if medium.kind != "video":
        raise KeyeError(f"{file} is an image: give a video, or use keye ask for images")
    return medium
