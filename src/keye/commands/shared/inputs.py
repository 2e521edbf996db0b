"""What commands start with: the media that the user named, and the model. Notes and progress go to standard error."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from keye.chat.messages import Medium, normalize_tools
from keye.commands.shared.options import (
    FORMAT_OPTIONS,
    IMAGE_OPTIONS,
    SAMPLING_OPTIONS,
    STORING_OPTIONS,
    VIDEO_OPTIONS,
    adapter_settings,
    flag,
    pick_set,
)  # fmt: skip
from keye.config.media import FetchLimits
from keye.errors import KeyeError, MediaError, Option, ScopeWarning
from keye.media.source.fetch import MAX_VIDEO_BYTES, Source, fetch_source, is_index, media_kind
from keye.process import set_threads
from keye.units import format_bytes, one_line

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.cluster.decode_reader import ServiceDecoder
    from keye.media.processor import Decoder
    from keye.media.speech import Transcriber

#: Largest file of functions.
MAX_TOOLS_BYTES = 4 << 20


def stderr() -> Console:
    """A console for progress and notes."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def note(sentence: str) -> None:
    """Prints a note on standard error."""
    stderr().print(f"keye: {one_line(sentence)}", style="dim")


def open_media(files: Sequence[str], options: Mapping[str, Any]) -> list[Medium]:
    """The named files as media, each with those options that its kind knows; http addresses are downloaded. Raises
    `MediaError` for a file that cannot be read; nothing is decoded yet. An index of a video takes no options. "-" is
    standard input."""
    media: list[Medium] = []
    indexes: list[str] = []
    limits = FetchLimits(allow_private=bool(options.get("allow_private_urls")))
    if files.count("-") > 1:
        raise KeyeError("standard input (-) is named twice, but can be read once: save it to a file first")
    for file in files:
        source = read_stdin() if file == "-" else fetch_source(file, limits=limits)
        if is_index(source):
            indexes.append(source.name)
            media.append(Medium("video", source))
        elif media_kind(source) == "image":
            media.append(Medium("image", source, pick_set(options, IMAGE_OPTIONS)))
        else:
            media.append(Medium("video", source, pick_set(options, VIDEO_OPTIONS)))
    used = {name for medium in media for name in medium.options}
    for name in indexes:
        _check_index_options(name, options, used)
    if unused := pick_set(options, VIDEO_OPTIONS).keys() - used:
        names = ", ".join(sorted(flag(name) for name in unused))
        note(f"{names} has no effect on images")
    return media


def read_stdin(most: int = MAX_VIDEO_BYTES) -> Source:
    """The file that is piped into the command, in a temporary file as long as it is used. `MediaError` for a terminal
    and for more than `most` bytes."""
    if sys.stdin.isatty():
        raise MediaError('standard input is a terminal: pipe a file into keye, as in: keye ask - "what?" < video.mp4')
    temporary = tempfile.NamedTemporaryFile(prefix="keye-stdin-")  # noqa: SIM115  (the source keeps it)
    size = 0
    while part := sys.stdin.buffer.read(1 << 20):
        size += len(part)
        if size > most:
            temporary.close()
            raise MediaError(
                f"standard input has more than the limit of {format_bytes(most)}; cut the video into parts"
            )
        try:
            temporary.write(part)
        except OSError as error:
            raise MediaError(
                f"standard input cannot be saved to {temporary.name} ({error.strerror}); free space"
            ) from None
    temporary.flush()
    return fetch_source(Source("standard input", size, path=Path(temporary.name), keep=temporary))


def _check_index_options(name: str, options: Mapping[str, Any], used: Collection[str]) -> None:
    """`KeyeError` for options that only an index could take; of those `used` by other media a note."""
    set_here = [option for option in (*VIDEO_OPTIONS, *FORMAT_OPTIONS) if options.get(option) is not None]
    if fixed := [option for option in set_here if option not in used]:
        raise KeyeError("{} is an index, whose frames and formats were chosen when it was made; leave {} out",
                        name, Option(fixed[0]))  # fmt: skip
    if set_here:
        note(f"{', '.join(map(flag, set_here))} has no effect on {name}, whose frames were chosen when it was made")


def silence_scope(options: Mapping[str, Any]) -> None:
    """With `--no-scope-notes` nothing is said of what a small model does not know."""
    if options.get("no_scope_notes"):
        warnings.simplefilter("ignore", ScopeWarning)


def find_model(name: str, mmproj: Path | None = None, *, weights: bool = True) -> Path:
    """The folder of a model, fetched under a progress bar if need be; without `weights` only its small files. `mmproj`
    is the vision part of one in a GGUF file."""
    from keye.hub import resolve

    with download_bar(name) as progress:
        return resolve(name, weights=weights, progress=progress, mmproj=mmproj)


def describing_folder(model: str, mmproj: Path | None = None) -> tuple[Path, bool]:
    """The folder that describes `model`, and whether it is keye's own copy of a published configuration, because the
    model is not on this machine. Only small files are fetched."""
    from huggingface_hub import try_to_load_from_cache

    from keye.hub import PUBLISHED, asset

    lowered = model.lower()
    for short, name in PUBLISHED.items():
        if lowered in (short, name.lower()):
            cached = try_to_load_from_cache(name, "config.json")
            if isinstance(cached, str):
                return Path(cached).parent, False
            return asset(f"configs/{short}"), True
    return find_model(model, mmproj, weights=False), False


def open_transcriber(options: Mapping[str, Any]) -> Transcriber | None:
    """The service that `--transcribe` names; None without."""
    if options["transcribe"] is None:
        if options["transcribe_model"] is not None:
            raise KeyeError("--transcribe-model names the model of a service: name that with --transcribe")
        return None
    from keye.config.environment import transcribe_key
    from keye.media.speech import Transcriber

    model = options["transcribe_model"] or Transcriber.model
    return Transcriber(options["transcribe"], model, transcribe_key())


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with bytes, speed and time left; one note instead where that is not a terminal. It
    appears with the first bytes, so nothing is shown for what is here already."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the bar shows new attempts
    console = stderr()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(f"fetching {one_line(name)}", total=None, start=False)
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            if not console.is_terminal:
                note(f"fetching {name}: {format_bytes(total - done)}")
            bar.start()
            bar.reset(task, total=total, completed=done)
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


def load_model(options: Mapping[str, Any], *, decoder: Decoder | None = None) -> Keye:
    """Loads the model of `options.running`; what its files hold unused or lack becomes one note."""
    from keye.config import load_model_config

    name, mmproj = options["model"], options.get("mmproj")
    load_model_config(find_model(name, mmproj, weights=False))  # weights that cannot be loaded are not downloaded
    find_model(name, mmproj)
    with stderr().status(f"loading {one_line(options['model'])}"):
        import keye

        if options["threads"]:
            set_threads(options["threads"])
        model = keye.load(
            options["model"], device=options["device"], dtype=options["dtype"], quant=options.get("quant"),
            **pick_set({name: options.get(name) for name in STORING_OPTIONS}, STORING_OPTIONS),
            template=options.get("template") or "auto", decoder=decoder, mmproj=mmproj,
            **adapter_settings(options.get("adapter")),
        )  # fmt: skip
    if model.notes:
        note("; ".join(model.notes))
    return model


def shares(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The device, threads and memory of each of `count` engines on this machine, where the user has not said: with
    --device cuda its GPUs in turn, and equal parts of the processor's threads and of the memory that is free."""
    import torch

    from keye.cache.slabs import free_memory

    cards = torch.cuda.device_count() if options["device"] == "cuda" else 0
    devices = [f"cuda:{number % cards}" if cards else options["device"] for number in range(count)]
    return [
        {"device": device, "threads": options["threads"] or max(1, torch.get_num_threads() // count),
         "memory": options["memory"] or (free_memory(device) or 0) // devices.count(device) or None}
        for device in devices
    ]  # fmt: skip


@contextmanager
def open_decoder(address: str | None) -> Iterator[ServiceDecoder | None]:
    """A decoder on the decode service at an address, for as long as it is needed; None without one."""
    if address is None:
        yield None
        return
    from keye.cluster.decode_reader import ServiceDecoder
    from keye.cluster.service import open_service

    with open_service(address) as service:
        note(f"{service.gauges()['workers']:.0f} decode workers on {address}")
        yield ServiceDecoder(service)


def read_tools(file: Path) -> tuple[Mapping[str, Any], ...]:
    """The functions in a JSON file."""
    try:
        if file.stat().st_size > MAX_TOOLS_BYTES:
            raise KeyeError(f"{file} has more than {MAX_TOOLS_BYTES:,} bytes: offer fewer functions")
        tools = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyeError(f"{file} cannot be read ({error.strerror}): give a JSON list of functions") from None
    except UnicodeDecodeError:
        raise KeyeError(f"{file} is not text in UTF-8: give a JSON list of functions") from None
    except (ValueError, RecursionError) as error:
        raise KeyeError(f"{file} is not JSON ({error}): give a JSON list of functions") from None
    return normalize_tools(tools)


def reply_options(model: Keye, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `Keye.stream`; says which of them will have no effect."""
    sampling = pick_set(options, SAMPLING_OPTIONS)
    if model.runtime.sampling_params(**sampling).temperature == 0:
        unused = [flag(name) for name in ("top_p", "top_k", "min_p", "seed") if name in sampling]
        if unused:
            note(f"{', '.join(unused)} has no effect at temperature 0")
    return {**sampling, "thinking": options["thinking"], "attention": options["attention"]}


def only_video(file: str, options: Mapping[str, Any]) -> Medium:
    """The one video, or index of one, of a command that takes no images."""
    (medium,) = open_media([file], options)
    if medium.kind != "video":
        raise KeyeError(f"{file} is an image: give a video, or use keye ask for images")
    return medium
