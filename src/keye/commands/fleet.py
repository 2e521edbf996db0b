"""`keye plan --fleet`: what it takes to answer questions about many videos a day."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.config import ConfigError
from keye.config.toml import build, check_keys, check_types, read_toml
from keye.errors import KeyeError
from keye.media.image import ImagePlan
from keye.planning.fleet import Costs, Fleet, Load, Outcome, size_fleet

if TYPE_CHECKING:
    from keye.planning.question import Planned

DAY = 86_400.0
#: Bytes of a second of video that is not there: 5 Mbit/s, as 720p often has.
IMAGINED_BYTES = 625_000


@dataclass(frozen=True)
class LoadTable:
    """`peak` is the busiest hour over the mean of the day, for which the fleet is sized."""

    videos_per_day: float
    questions: int = 1
    peak: float = 2.0

    def __post_init__(self) -> None:
        check_types(self, "load")
        if not (self.videos_per_day > 0 and self.questions > 0 and self.peak >= 1):
            raise ConfigError("load: videos_per_day and questions must be above 0, peak at least 1")


@dataclass(frozen=True)
class GoalTable:
    """95 of 100 first answers come within `seconds` of the video."""

    seconds: float

    def __post_init__(self) -> None:
        check_types(self, "goal")


@dataclass(frozen=True)
class NodeTable:
    """A machine: `workers` decode workers (one for a core) or engines in it, and its price an hour."""

    workers: int = 1
    price: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "node")
        if self.workers < 1 or self.price < 0:
            raise ConfigError("decode_node and engine_node: workers must be 1 or more, price not below 0")


@dataclass(frozen=True)
class MeasuredTable:
    """Times of real machines, in place of what --device predicts; see `keye.planning.fleet.Costs`."""

    decode: float | None = None
    engine: Sequence[Sequence[float]] = ()
    later: float = 1.0
    spread: float = 0.3

    def __post_init__(self) -> None:
        check_types(self, "measured")
        if not all(len(pair) == 2 for pair in self.engine):
            raise ConfigError("measured: engine is a list of [requests at once, seconds for each], e.g. [[1, 2.0]]")


@dataclass(frozen=True)
class FleetPlan:
    """A whole file."""

    load: LoadTable
    goal: GoalTable
    decode_node: NodeTable = field(default_factory=lambda: NodeTable(workers=16))
    engine_node: NodeTable = field(default_factory=NodeTable)
    measured: MeasuredTable = field(default_factory=MeasuredTable)


_TABLES: Mapping[str, type] = {
    "load": LoadTable, "goal": GoalTable, "decode_node": NodeTable, "engine_node": NodeTable,
    "measured": MeasuredTable,
}  # fmt: skip


def load_fleet_plan(path: Path) -> FleetPlan:
    """Reads the file; `ConfigError` for whatever is wrong with it."""
    raw = read_toml(path, "a description of the load such as configs/fleet.toml")
    check_keys(raw, FleetPlan, str(path))
    tables = {}
    for name, table in raw.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a table, written [{name}]")
        check_keys(table, _TABLES[name], f"{path}, {name}")
        tables[name] = build(_TABLES[name], table, f"{path}, {name}")
    made = build(FleetPlan, tables, str(path))
    assert isinstance(made, FleetPlan)
    return made


def plan_fleet(path: Path, planned: Sequence[Planned], prediction: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fleet for a load of videos like the planned one, as plain data."""
    told = load_fleet_plan(path)
    if len(planned) != 1 or planned[0].kind != "video":
        raise KeyeError("--fleet needs one video that stands for all: one file, or --video LENGTH")
    costs, notes = costs_of(told.measured, planned[0], prediction)
    load = Load(told.load.videos_per_day / DAY * told.load.peak, told.load.questions)
    fleet, outcome = size_fleet(load, costs, seconds=told.goal.seconds, together=costs.engine[-1][0])
    return summary(told, load, costs, fleet, outcome, notes)


def costs_of(
    measured: MeasuredTable, one: Planned, prediction: Mapping[str, Any] | None
) -> tuple[Costs, tuple[str, ...]]:
    """What a video costs, by what was measured or else by what was predicted, and notes on that."""
    plan, notes = one.plan, []
    assert not isinstance(plan, ImagePlan)
    seconds: Mapping[str, float] = {} if prediction is None else prediction["seconds"]
    decode = measured.decode if measured.decode is not None else seconds.get("media")
    engine = [(int(count), float(each)) for count, each in measured.engine]
    if not engine and "prefill" in seconds:
        engine = [(1, sum(seconds[name] for name in ("vision", "prefill", "generate")))]
        notes.append("times of the engine are predicted for one request at once; with several it gets through more")
    if decode is None or not engine:
        lacks = "decode" if decode is None else "engine"
        raise KeyeError(f"--fleet does not know the time of {lacks}: set it under [measured], or give --device")
    file_bytes = int(plan.duration * IMAGINED_BYTES)
    if one.source is not None and one.source.path is not None:
        file_bytes = Path(one.source.path).stat().st_size
    frame_bytes = plan.frames * plan.height * plan.width * 3
    return Costs(decode, tuple(engine), measured.later, measured.spread, file_bytes, frame_bytes), tuple(notes)


def summary(
    told: FleetPlan, load: Load, costs: Costs, fleet: Fleet, outcome: Outcome, notes: Sequence[str]
) -> dict[str, Any]:
    """Everything of a plan, as plain data. Prices are for a day."""
    decode_nodes = math.ceil(fleet.decoders / told.decode_node.workers)
    engine_nodes = math.ceil(fleet.replicas / told.engine_node.workers)
    price = 24 * (decode_nodes * told.decode_node.price + engine_nodes * told.engine_node.price)
    return {
        "videos_per_second": load.rate, "questions": load.questions, "costs": asdict(costs),
        "decode_workers": fleet.decoders, "decode_nodes": decode_nodes,
        "engines": fleet.replicas, "engine_nodes": engine_nodes, "requests_at_once": fleet.together,
        "seconds": {"mean": outcome.mean, "median": outcome.median, "p95": outcome.p95, "goal": told.goal.seconds},
        "busy": {"decode": outcome.decoders, "engine": outcome.engines},
        "bytes_per_second": {"to_decoders": load.rate * costs.file_bytes, "to_engines": load.rate * costs.frame_bytes},
        "bytes_per_day": {
            "to_decoders": told.load.videos_per_day * costs.file_bytes,
            "to_engines": told.load.videos_per_day * costs.frame_bytes,
        },
        "price_per_day": price, "price_per_video": price / told.load.videos_per_day,
        "notes": list(notes),
    }  # fmt: skip


def print_fleet(result: Mapping[str, Any]) -> None:
    """A plan for people."""
    from keye.commands.shared.show import stdout
    from keye.commands.shared.terminal import one_line
    from keye.units import format_bytes

    console = stdout()
    seconds, busy, moved = result["seconds"], result["busy"], result["bytes_per_second"]
    lines = (
        "",
        f"At {result['videos_per_second']:.3g} videos a second, the busiest hour:",
        f"  decode    {result['decode_workers']} workers on {result['decode_nodes']} nodes, busy {busy['decode']:.0%}",
        f"  engines   {result['engines']} on {result['engine_nodes']} nodes, "
        f"{result['requests_at_once']} requests at once in each, at work {busy['engine']:.0%} of the time",
        f"  answers   median {seconds['median']:.3g} s after the video, 95 of 100 within {seconds['p95']:.3g} s "
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
