"""What `keye plan --device` and `keye ask --estimate` predict: from plans to a request, from rates to its cost."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.config import KeyeConfig, ProcessorConfig
from keye.config.media import MediaOptions, media_options
from keye.errors import KeyeError
from keye.media.image import ImagePlan, plan_image
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.processor import VisualSpan, expand_frames
from keye.media.source.fetch import Source, fetch_source
from keye.media.video import VideoReader, plan_video
from keye.process import check_device, memory_on, set_threads

if TYPE_CHECKING:
    from keye.cache.slabs import KVFormat
    from keye.chat.messages import Medium
    from keye.models.attention import AttentionMode

#: Tokens that the template and a short question take, where the tokenizer is not here to count them.
WORDS = 40
#: Tokens of a reply where none are asked for.
REPLY = 128
#: Frames of the clip that stands for a video that is not there, and seconds for which a real one is read.
CLIP_FRAMES, READ_SECONDS = 24, 1.0
#: Rate of a video that is not there.
IMAGINED_FPS = 30
_LENGTH = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True)
class Planned:
    """A medium with its plan; `source` is None for a video that is not there."""

    kind: str
    source: Source | None
    plan: VideoPlan | ImagePlan


def imagine_video(text: str) -> VideoInfo:
    """What probing a video of that length and size would find: "2h", "1h30m", "90s", "1:30:00", "2h@1920x1080"."""
    length, _, size = text.strip().lower().partition("@")
    seconds = _seconds(length)
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", size or "1280x720")
    if seconds is None or seconds < 1 or seconds > 48 * 3600 or match is None:
        raise KeyeError(f"--video is {text!r}; write a length from 1s to 48h and if need be a size, as in 2h@1280x720")
    width, height = int(match[1]), int(match[2])
    return VideoInfo(
        name=f"a video of {text}", format="imagined", codec="h264", width=width, height=height, rotation=0,
        fps=float(IMAGINED_FPS), time_base=Fraction(1, IMAGINED_FPS), pts=tuple(range(round(seconds * IMAGINED_FPS))),
        exact_times=True, constant_rate=True, declared_duration=None,
    )  # fmt: skip


def _seconds(length: str) -> float | None:
    from keye.chat.times import to_seconds

    match = _LENGTH.fullmatch(length)
    if match is not None and any(match.groups()):
        return sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True) if part)
    try:
        return to_seconds(length)
    except KeyeError:
        return None


def plan_media(media: Sequence[Medium], config: ProcessorConfig) -> list[Planned]:
    """The plans of opened media, in order."""
    videos = max(1, sum(medium.kind == "video" for medium in media))
    planned = []
    for medium in media:
        source: Any = medium.source
        settings = media_options(medium.kind, medium.options, video_count=videos)
        plan = plan_image(source, config, settings) if medium.kind == "image" else plan_video(source, config, settings)
        planned.append(Planned(medium.kind, source, plan))
    return planned


def predict_question(media: Sequence[Medium], folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What asking the model in `folder` about opened media will take, before it is loaded."""
    from keye.config import load_model_config, load_processor_config

    config = load_processor_config(folder)
    options = {**options, "max_tokens": options["max_tokens"] or REPLY}
    return predict(load_model_config(folder), config, folder, plan_media(media, config), options)


def errors_of(prediction: Mapping[str, Any], seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """How far a prediction was from the `seconds` that a reply of `tokens` took: 0.25 is a quarter too short, -0.25 a
    quarter too long. `first_token` is all that comes before the reply, `token` one token of it."""
    predicted = prediction["seconds"]
    if "prefill" not in predicted:
        return {}
    before = sum(predicted[name] for name in ("media", "vision", "prefill") if name in predicted)
    pairs = {"first_token": (before, seconds["media"] + seconds["prefill"])}
    if tokens > 1:
        pairs["token"] = (1 / prediction["generate_tokens_per_second"], seconds["generate"] / (tokens - 1))
    return {name: round((actual - guess) / actual, 3) for name, (guess, actual) in pairs.items() if actual > 0}


def predict(
    model: KeyeConfig, config: ProcessorConfig, folder: Path, planned: Sequence[Planned], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Memory and time of one question about the planned media, as plain data; what cannot be had is in `notes`."""
    import torch

    from keye.models.load import loaded_bytes, torch_dtype
    from keye.planning.estimate import estimate, measure_rates, what_fits

    check_device(options["device"])
    device = torch.device(options["device"])
    kv: KVFormat = options["kv"] or "auto"
    mode: AttentionMode = options["attention"] or "sparse"
    dtype, notes = torch_dtype(options["dtype"] or model.dtype), list[str]()
    if options["threads"]:
        set_threads(options["threads"])
    request = request_of(model, config, folder, planned, options["max_tokens"])
    memory = memory_on(str(device))
    weights = None if options["dtype"] else loaded_bytes(folder, model, dtype)
    rates = None
    try:
        free = None if memory is None else memory.free
        rates = measure_rates(model, request.grid, dtype=dtype, device=device, kv=kv, mode=mode, free=free)
    except KeyeError as error:
        notes.append(f"{error}; time is not predicted")
    prediction = estimate(model, request, rates, dtype=dtype, device=str(device), kv=kv, weights=weights)
    fits = None if memory is None else prediction.total <= memory.free
    advice = None if memory is None or fits else what_fits(model, request, dtype, memory.free, weights)
    if prediction.context > model.text.max_position_embeddings:
        notes.append(f"the context holds {model.text.max_position_embeddings:,} tokens: sample fewer or smaller frames")
    return {
        **prediction.to_dict(), "prompt_tokens": request.prompt, "reply_tokens": request.reply, "fits": fits,
        "free_bytes": None if memory is None else memory.free, "what_fits": advice, "notes": notes,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def request_of(model: KeyeConfig, config: ProcessorConfig, folder: Path, planned: Sequence[Planned], reply: int) -> Any:
    """The planned media and one short question as `CostQuery`."""
    from keye.chat.tokenizer import Tokenizer
    from keye.planning.estimate import CostQuery

    frames, visual, text = 0, 0, WORDS
    tokenizer = Tokenizer.from_file(folder) if (folder / "tokenizer.json").exists() else None
    grid, patch = (1, 1), config.patch_size
    for medium in planned:
        plan = medium.plan
        visual += plan.visual_tokens
        if grid[0] * grid[1] <= (plan.height // patch) * (plan.width // patch):
            grid = plan.height // patch, plan.width // patch
        if isinstance(plan, ImagePlan):
            frames += 1
            continue
        frames += plan.frames
        pieces = expand_frames([plan.tokens_per_frame] * plan.frames, config, plan.labels)
        if not config.release.whole_video:
            texts = [piece for piece in pieces if not isinstance(piece, VisualSpan)]
            if tokenizer is not None:
                text += sum(len(tokenizer.encode(piece, special=True)) for piece in texts)
            else:  # every digit for one and a mark for one
                labels = [piece.partition("|>")[2] or piece for piece in texts]
                text += sum(1 + sum(not letter.isalpha() for letter in label) for label in labels)
    return CostQuery(frames, grid, visual + text, reply, media_seconds(planned))


def media_seconds(planned: Sequence[Planned]) -> float:
    """Seconds to open and decode, from the first second of each video, or for an imagined one from a clip like it."""
    total = 0.0
    for plan, source in ((medium.plan, medium.source) for medium in planned):
        if not isinstance(plan, VideoPlan):
            continue
        if source is None:
            total += _imagined_seconds(plan)
            continue
        begin = time.perf_counter()
        with VideoReader(source, track=plan.track) as reader:
            opened, done = time.perf_counter(), 0
            for _ in reader.frames(plan):
                done += 1
                if time.perf_counter() - opened > READ_SECONDS:
                    break
            reading = time.perf_counter() - opened
        total += opened - begin + reading * plan.frames / max(1, done)
    return total


def _imagined_seconds(plan: VideoPlan) -> float:
    """Every frame of such a video is decoded; the sampled ones are also resized, which the clip does with all."""
    from keye.config import ProcessorConfig
    from keye.data import frameforge

    size = plan.source_width // 2 * 2, plan.source_height // 2 * 2
    with tempfile.TemporaryDirectory(prefix="keye-plan-") as folder:
        path = Path(folder) / "clip.mp4"
        frameforge.write_mp4(frameforge.make_clip(0, frames=CLIP_FRAMES, size=size, step=0.5, start=0.0), path, size)
        with VideoReader(fetch_source(path)) as reader:
            plan = reader.plan(ProcessorConfig(), MediaOptions(nframes=CLIP_FRAMES))
            begin = time.perf_counter()
            reader.read(plan)
            each = (time.perf_counter() - begin) / CLIP_FRAMES
    return each * (plan.duration - plan.start_offset) * plan.native_fps
