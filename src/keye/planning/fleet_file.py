"""The file of `keye plan --fleet`: how many videos come, how soon they must be answered, what nodes there are.

Sizes a fleet for it (`keye.planning.fleet`), with times that were measured or predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from keye.config.settings import Settings, parse_settings, read_toml
from keye.errors import KeyeError
from keye.media.image import ImagePlan
from keye.planning.fleet import Costs, Load, size_fleet
from keye.planning.question import Planned

DAY = 86_400.0
#: Assumed bytes of a second of video where the video is imagined: 5 Mbit/s, as 720p often has.
BYTES_PER_SECOND = 625_000


class LoadTable(Settings):
    videos_per_day: float = Field(gt=0)
    questions: int = Field(default=1, gt=0)
    """About each video; the later ones find it in the engine's cache."""
    peak: float = Field(default=2.0, ge=1)
    """The busiest hour over the mean of the day; the fleet is sized for that hour."""


class GoalTable(Settings):
    seconds: float = Field(gt=0)
    """Goal for the p95 of the time from a video to its first answer."""


class NodeTable(Settings):
    """A machine."""

    workers: int = Field(default=1, gt=0)
    """Decode workers (one for each core) or engines in it."""
    price: float = Field(default=0.0, ge=0)
    """An hour, in any currency."""


class MeasuredTable(Settings):
    """Times of real machines, in place of what --device predicts."""

    decode: float | None = None
    """Seconds of one core for one video."""
    engine: tuple[Annotated[tuple[int, float], Field(strict=False)], ...] = Field(default=(), strict=False)
    """Pairs of requests at once and seconds of the engine for each of them, e.g. [[1, 2.0], [4, 1.0]]."""
    later: float = 1.0
    """A later question about the same video, as a share of the first."""
    spread: float = 0.3
    """Standard deviation of these times over their mean."""


class FleetFile(Settings):
    """A load of videos."""

    load: LoadTable
    goal: GoalTable
    decode_node: NodeTable = NodeTable(workers=16)
    engine_node: NodeTable = NodeTable()
    measured: MeasuredTable = MeasuredTable()


def plan_fleet(path: Path, planned: Sequence[Planned], prediction: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fleet for a load of videos like the planned one, as plain data; `KeyeError` for what is wrong with the file
    or what it lacks. `prediction` is that of `keye.planning.question.predict`."""
    file = parse_settings(FleetFile, read_toml(path, "a description of the load such as configs/fleet.toml"), path)
    if len(planned) != 1 or planned[0].kind != "video":
        raise KeyeError("--fleet needs one video that stands for all: one file, or --video LENGTH")
    costs, notes = find_costs(file.measured, planned[0], prediction)
    load = Load(file.load.videos_per_day / DAY * file.load.peak, file.load.questions)
    fleet, outcome = size_fleet(load, costs, seconds=file.goal.seconds, together=costs.engine[-1][0])
    decode_nodes = math.ceil(fleet.decoders / file.decode_node.workers)
    engine_nodes = math.ceil(fleet.replicas / file.engine_node.workers)
    price = 24 * (decode_nodes * file.decode_node.price + engine_nodes * file.engine_node.price)  # a day
    to_decoders, to_engines, a_day = costs.file_bytes, costs.frame_bytes, file.load.videos_per_day
    return {
        "videos_per_second": load.rate, "questions": load.questions, "costs": asdict(costs),
        "decode_workers": fleet.decoders, "decode_nodes": decode_nodes,
        "engines": fleet.replicas, "engine_nodes": engine_nodes, "requests_at_once": fleet.together,
        "seconds": {"mean": outcome.mean, "median": outcome.median, "p95": outcome.p95, "goal": file.goal.seconds},
        "busy": {"decode": outcome.decoders, "engine": outcome.engines},
        "bytes_per_second": {"to_decoders": load.rate * to_decoders, "to_engines": load.rate * to_engines},
        "bytes_per_day": {"to_decoders": a_day * to_decoders, "to_engines": a_day * to_engines},
        "price_per_day": price, "price_per_video": price / a_day, "notes": notes,
    }  # fmt: skip


def find_costs(
    measured: MeasuredTable, video: Planned, prediction: Mapping[str, Any] | None
) -> tuple[Costs, list[str]]:
    """What a video costs, by what was measured or else by what was predicted, and notes on that."""
    plan, notes = video.plan, list[str]()
    assert not isinstance(plan, ImagePlan)
    seconds: Mapping[str, float] = {} if prediction is None else prediction["seconds"]
    decode = measured.decode if measured.decode is not None else seconds.get("media")
    engine = measured.engine
    if not engine and "prefill" in seconds:
        engine = ((1, sum(seconds[name] for name in ("vision", "prefill", "generate"))),)
        notes.append("times of the engine are predicted for one request at once; with several it gets through more")
    if decode is None or not engine:
        lacks = "decode" if decode is None else "engine"
        raise KeyeError(f"--fleet does not know the time of {lacks}: set it under [measured], or give --device")
    file_bytes = int(plan.duration * BYTES_PER_SECOND)
    if video.source is not None and video.source.path is not None:
        file_bytes = Path(video.source.path).stat().st_size
    frame_bytes = plan.frames * plan.height * plan.width * 3
    return Costs(decode, engine, measured.later, measured.spread, file_bytes, frame_bytes), notes
