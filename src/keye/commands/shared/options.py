"""Options that several commands share, as decorators. What is not given is None: the library has the defaults."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from keye.errors import KeyeError, Option
from keye.units import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

IMAGE_OPTIONS = ("min_pixels", "max_pixels", "strict_official")
VIDEO_OPTIONS = (
    *IMAGE_OPTIONS, "fps", "nframes", "min_frames", "max_frames", "video_total_pixels", "video_start", "video_end",
    "min_frame_similarity", "adaptive_budget", "track", "deinterlace", "tone_map", "strict_media",
)  # fmt: skip
#: Formats, which an index fixes; the tier of the KV state is free.
FORMAT_OPTIONS = ("kv", "indexer_kv")
STORING_OPTIONS = (*FORMAT_OPTIONS, "kv_tier", "kv_folder", "memory", "experts", "experts_folder")
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


class Seconds(click.ParamType):
    """A time in seconds, mm:ss or hh:mm:ss."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        from keye.chat.times import to_seconds

        try:
            return to_seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Positive(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not 0 < number < math.inf:
            self.fail(f"{value} must be above 0.", param, ctx)
        return number


class Handles(click.ParamType):
    """Seconds before and after a range: one number for both, or two with a comma."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [float(part) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(0 <= number < math.inf for number in numbers):
            self.fail(f"{value!r} is not a number of seconds, or two with a comma between them.", param, ctx)
        return numbers[0], numbers[-1]


class Bytes(click.ParamType):
    """A size in bytes: 8GiB, 500MB, 4096."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return parse_bytes(value, (param.name if param is not None else None) or "size")


COUNT = click.IntRange(min=1)
PATH = click.Path(path_type=Path)


def combine(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator that adds options in the order in which help lists them."""
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace existing files, also ones that keye did not write.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
model_name = click.option("--model", default="nano", show_default=True,
                          help="A name (nano, 2.0), a name on the hub, a folder, or a GGUF file.")  # fmt: skip
mmproj = click.option("--mmproj", type=PATH, metavar="FILE",
                      help="Vision part of a model in a GGUF file.  [default: the mmproj*.gguf beside it]")  # fmt: skip
running_device: Callable[[F], F] = combine(
    mmproj,
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."),
    click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
                 help="Number format of the weights.  [default: the checkpoint's]"),
    click.option("--quant", type=click.Choice(["int4", "int8", "fp8", "none"]),
                 help="Quantise the weights while they are loaded, or make plain numbers of a GGUF file's.  "
                      "[default: as the checkpoint has them]"),
    click.option("--threads", type=COUNT, metavar="N", help="Processor threads for the model."),
)  # fmt: skip
adapter = click.option("--adapter", metavar="[NAME=]DIR", help="LoRA adapter to answer with, a folder that PEFT wrote.")
adapters = click.option("--adapter", multiple=True, metavar="[NAME=]DIR",
                        help="LoRA adapter, a folder that PEFT wrote; clients name it as model. May be repeated."
                        )  # fmt: skip
running: Callable[[F], F] = combine(model_name, running_device, adapter)
template = click.option(
    "--template", metavar="auto|keye|checkpoint|FILE", default="auto", show_default=True,
    help="Chat template: the checkpoint's own if it has one (auto), keye's, the checkpoint's, or a file.",
)  # fmt: skip
prompting: Callable[[F], F] = combine(
    template,
    click.option("--tools", type=PATH, metavar="FILE",
                 help="JSON list of functions that the model may ask to be called."),
)  # fmt: skip
kv_format = click.option("--kv", type=click.Choice(["auto", "bf16", "fp8", "int8", "int4"]),
                         help="Number format of stored keys and values.  [default: auto, that of the weights]"
                         )  # fmt: skip
storing: Callable[[F], F] = combine(
    kv_format,
    click.option("--indexer-kv", type=click.Choice(["auto", "bf16", "fp8", "int8"]), help="The same for indexer keys."),
    click.option("--kv-tier", type=click.Choice(["memory", "host", "file"]),
                 help="Where keys and values are: with the model, in main memory, or in a mapped file.  "
                      "[default: memory]"),
    click.option("--kv-folder", type=PATH, metavar="DIR",
                 help="Folder of the mapped file.  [default: the system's temporary folder]"),
    click.option("--memory", type=Bytes(), metavar="SIZE",
                 help="Memory budget of keys, values and visual tokens, as 8GiB.  [default: what is free]"),
    click.option("--experts", type=click.Choice(["memory", "disk"]),
                 help="Where quantised experts are: in memory, or in a file of which the system keeps what is used.  "
                      "[default: memory]"),
    click.option("--experts-folder", type=PATH, metavar="DIR",
                 help="Folder of that file, as large as the experts.  [default: keye's cache]"),
)  # fmt: skip
transcribe: Callable[[F], F] = combine(
    click.option("--transcribe", metavar="URL",
                 help="Transcription service with OpenAI's interface that speech may be sent to; its key stands in "
                      "KEYE_TRANSCRIBE_KEY."),
    click.option("--transcribe-model", metavar="NAME", help="Its model.  [default: whisper-1]"),
)  # fmt: skip
decode = click.option(
    "--decode", metavar="ADDRESS",
    help="Decode videos in other processes: local, local:N, ray or ray://HOST:PORT.  [default: one for each video]",
)  # fmt: skip
attention = click.option(
    "--attention", type=click.Choice(["sparse", "dense"]),
    help="dense attends to every token, also above the model's top-k, which it was not trained for."
         "  [default: sparse where the model has it]",
)  # fmt: skip
asking: Callable[[F], F] = combine(
    click.option("--workers", type=COUNT, metavar="N", help="Engines, each in a process of its own."),
    click.option("--ray", metavar="ADDRESS", help="Engines on a Ray cluster: ray, HOST:PORT or ray://HOST:PORT."),
    click.option("--concurrency", type=COUNT, default=8, show_default=True, metavar="N",
                 help="Questions that each worker answers at once."),
    click.option("--tries", type=COUNT, default=6, show_default=True, metavar="N",
                 help="Tries of a request to a server that is full, fails or does not answer."),
    click.option("--timeout", type=click.FloatRange(min=0, min_open=True, max=86400), metavar="SECONDS",
                 help="Time limit of an answer from a server.  [default: 3600]"),
)  # fmt: skip
private_urls = click.option("--allow-private-urls", is_flag=True,
                            help="Open http addresses of this machine and local networks.")  # fmt: skip
reading: Callable[[F], F] = combine(
    click.option("--track", type=COUNT, metavar="N", help="The video track to read.  [default: as players choose]"),
    click.option("--deinterlace/--no-deinterlace", default=None,
                 help="Whether frames that the file calls interlaced are deinterlaced.  [default: deinterlace]"),
    click.option("--tone-map", is_flag=True, default=None, help="Convert high dynamic range to standard range."),
    click.option("--strict-media", is_flag=True, default=None, help="Reject files that are damaged or end early."),
    click.option("--start", "video_start", type=Seconds(), help="Begin here: seconds, mm:ss or hh:mm:ss."),
    click.option("--end", "video_end", type=Seconds(), help="End here."),
)  # fmt: skip
sampling_frames: Callable[[F], F] = combine(
    click.option("--fps", type=Positive(), help="Frames sampled per second of video."),
    click.option("--nframes", type=COUNT, metavar="N", help="Number of frames, instead of --fps."),
    click.option("--min-frames", type=COUNT, metavar="N", help="At least this many frames."),
    click.option("--max-frames", type=COUNT, metavar="N", help="At most this many frames."),
    click.option("--min-pixels", type=COUNT, metavar="N", help="Fewest pixels of a frame or image."),
    click.option("--max-pixels", type=COUNT, metavar="N", help="Most pixels of a frame or image."),
    click.option("--total-pixels", "video_total_pixels", type=COUNT, metavar="N", help="Most pixels of all frames."),
    click.option("--adaptive-budget/--no-adaptive-budget", default=None,
                 help="Keye-VL 2.0: a single video of up to 34 minutes gets a share of --total-pixels by its length."
                      "  [default: as the model's files say]"),
    click.option("--min-frame-similarity", type=click.FloatRange(0, 1), metavar="SHARE",
                 help="Keye-VL 1.5: a frame that shares fewer patches with the last slow frame is slow.  "
                      "[default: 0.9]"),
    reading,
    click.option("--strict-official", is_flag=True, default=None,
                 help="Sample as the official code does, also where it ignores an option or fails."),
    private_urls,
)  # fmt: skip
no_scope_notes = click.option(
    "--no-scope-notes", is_flag=True, help="Do not say when a question or a video is beyond what a small model knows."
)
sampling_text: Callable[[F], F] = combine(
    click.option("--max-tokens", type=COUNT, metavar="N", help="Longest reply, in tokens."),
    click.option("--temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-p", type=float, help="Sample from the likeliest tokens that together reach this probability."),
    click.option("--top-k", type=int, help="Sample from this many likeliest tokens; 0 is off."),
    click.option("--min-p", type=float, help="Leave out tokens below this share of the likeliest one's probability."),
    click.option("--repetition-penalty", type=float, help="Above 1: tokens of the reply so far become less likely."),
    click.option("--seed", type=int, help="Seed of sampling."),
    click.option("--stop", multiple=True, help="End the reply before this text; may be repeated."),
    click.option("--think/--no-think", "thinking", default=None,
                 help="Ask for or against reasoning before the answer."),
)  # fmt: skip
exporting: Callable[[F], F] = combine(
    click.option("--export", "export", multiple=True, metavar="FILE",
                 help="Write the moments as .xml (Premiere), .fcpxml, .edl, .otio, .csv, .srt, .vtt, .txt (chapters), "
                      ".ffmetadata or .json; may be repeated. FORMAT:FILE names the format."),
    click.option("--export-rate", metavar="RATE",
                 help="Frames a second of exports: 25, 29.97df.  [default: the file's]"),
    click.option("--start-timecode", metavar="TIMECODE", help="First timecode of exports.  [default: 01:00:00:00]"),
    click.option("--handles", type=Handles(), metavar="SECONDS",
                 help="Seconds that exports show before and after each moment: 1, or 1,2."),
    click.option("--markers", is_flag=True, help="Export markers on the whole video instead of clips in a sequence."),
    click.option("--record", type=PATH, metavar="FILE",
                 help="Write what was asked, looked at and answered, with which model, to an .html file."),
)  # fmt: skip


def flag(name: str) -> str:
    """The option of the command line that sets `name`."""
    return "--" + name.removeprefix("video_").replace("_", "-")


def spelled(option: Option) -> str:
    """An option that a sentence names, as the command line has it."""
    return flag(option.name) if option.value is None else f"{flag(option.name)} {option.value}"


def pick_set(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that the user has set."""
    return {name: options[name] for name in names if options[name] is not None and options[name] != ()}


def adapter_settings(value: str | Sequence[str] | None) -> dict[str, Any]:
    """Arguments of `keye.load` for the adapters of the command line: one that answers all questions, or several of
    which each request chooses. `KeyeError` for two of one name."""
    values = [value] if isinstance(value, str) else list(value or ())
    folders: dict[str, str] = {}
    for each in values:
        name, _, folder = ("", "", each) if Path(each).expanduser().is_dir() or "=" not in each else each.partition("=")
        path = Path(folder).expanduser().absolute()
        name = name or path.name
        if name in folders:
            raise KeyeError("{} has the name {} twice: give each adapter its own, as NAME=DIR",
                            Option("adapter"), repr(name))  # fmt: skip
        folders[name] = str(path)
    return {} if not folders else {"adapters": folders, **({"adapter": name} if isinstance(value, str) else {})}


def engine_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `keye.load`, and `threads`, as plain data."""
    names = ("model", "mmproj", "device", "dtype", "quant", "threads", "template", *STORING_OPTIONS)
    settings = {name: arguments[name] for name in names if arguments.get(name) is not None}
    for name in ("model", "mmproj"):
        if name in settings and (path := Path(settings[name])).exists():
            settings[name] = str(path.absolute())  # other processes may have other working folders
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return {**plain, **adapter_settings(arguments.get("adapter"))}
