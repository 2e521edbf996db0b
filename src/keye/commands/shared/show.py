"""How results look: the streamed answer, its timeline, what it cost, and plans. Answers go to standard output."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Table
from rich.text import Text

from keye.chat.replies import Region
from keye.chat.times import Interval, format_seconds, merge_intervals
from keye.commands.shared.inputs import note, stderr
from keye.commands.shared.language import in_english
from keye.errors import is_number
from keye.units import format_bytes, one_line, plural, printable

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.engine.evidence import Evidence
    from keye.engine.request import Progress as Step
    from keye.sessions.answer import Answer, AnswerStream
    from keye.sessions.video_index import IndexInfo

#: Widest timeline, in characters.
MAX_BAR: Final = 72
#: Seconds between two lines where standard error is not a terminal, and until the time left is first shown.
LINE_SECONDS: Final = 5.0
FIRST_SECONDS: Final = 3.0
#: Times of a plan that are listed before the middle is left out.
MAX_TIMES: Final = 48


def stdout() -> Console:
    """A console for results."""
    return Console(highlight=False, markup=False, emoji=False)


def print_line(text: str) -> None:
    stdout().print(one_line(text), soft_wrap=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line of standard output, whatever its width."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


# Answers


def print_stream(stream: AnswerStream, first: str) -> Answer:
    """Prints the text as it comes, `first` of all, and returns the answer. Warnings that come with its end are given
    once its line has ended."""
    print(printable(first), end="", flush=True)
    with warnings.catch_warnings(record=True) as late:
        for piece in stream:
            print(printable(piece), end="", flush=True)
    print(flush=True)
    for warning in late:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    assert stream.answer is not None
    return stream.answer


def print_answer(answer: Answer, model: Keye) -> None:
    """What follows the text of an answer: the other replies where several were asked for, what it marks and calls, its
    intervals on a timeline, and what it cost."""
    console = stdout()
    for number, other in enumerate(answer.alternatives, 2):
        console.print(f"{number}: {printable(other.text)}", soft_wrap=True)
    calls = [f"call {call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in answer.tool_calls]
    for mark in [*calls, *region_lines(answer.regions)]:
        console.print(f"  {one_line(mark)}", soft_wrap=True)
    if answer.intervals:
        for line in timeline(answer.intervals, video_length(answer.plan), min(console.width, MAX_BAR + 24)):
            console.print(line, soft_wrap=True)
    sparse = model.config.text.sparse
    console.print(usage_line(answer, sparse.topk if sparse is not None else None), style="dim", soft_wrap=True)


def print_evidence(evidence: Evidence) -> None:
    """The frames of each medium that were selected most, or why none was."""
    if evidence.reason is not None:
        print_line(f"no evidence: {evidence.reason}")
    for medium in evidence.media:
        if medium.kind == "video":
            moments = [f"{medium.times[i]:.1f} s" if medium.times else f"frame {i}" for i in medium.top()]
            named = [f"{moment} ({medium.lifts[i]:.1f}x)" for moment, i in zip(moments, medium.top(), strict=True)]
            print_line(f"rests on {medium.name} at {', '.join(named) or 'no frame'}")
        else:
            print_line(f"rests on {medium.name}: {medium.share:.0%} of what was selected")


def region_lines(regions: Sequence[Region]) -> list[str]:
    """One line for each place that an answer marks, numbered as in its drawing; coordinates are thousandths."""
    lines = []
    for number, region in enumerate(regions, 1):
        if region.points:
            corners = " ".join(f"({x:g}, {y:g})" for x, y in region.points[:8])
            more = f" and {len(region.points) - 8} more" if len(region.points) > 8 else ""
            lines.append(f"{number} {region.kind} {corners}{more} {region.label or ''}")
    return lines


def video_length(plans: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the one video that an answer is about; None where there are several, or none."""
    lengths = [plan["duration"] for plan in plans if "duration" in plan]
    return float(lengths[0]) if len(lengths) == 1 else None


def timeline(intervals: Sequence[Interval], length: float | None, width: int) -> list[Text]:
    """A bar from 0 to `length` seconds with the intervals filled in, and a line for each interval.

    The bar is `width` characters with its labels; it is left out where the length is not known. Every interval fills
    at least one character; one beyond the end makes the bar longer.
    """
    lines = []
    if length is not None:
        end = max(length, *(stop for _, stop in intervals))
        left, right = format_seconds(0.0), format_seconds(end)
        cells = max(10, min(MAX_BAR, width - len(left) - len(right) - 4))
        bar = Text(f"{left} ▕")
        for on in filled_cells(intervals, end, cells):
            bar.append("█" if on else "─", style="green" if on else "dim")
        lines.append(bar.append(f"▏ {right}"))
    for start, stop in intervals:
        span = f"{format_seconds(start)} to {format_seconds(stop)}"
        lines.append(Text(f"  {span}  ({format_seconds(stop - start)})"))
    return lines


def filled_cells(intervals: Sequence[Interval], length: float, cells: int) -> list[bool]:
    """Which of `cells` equal parts of 0..length an interval touches."""
    filled = [False] * cells
    for start, stop in merge_intervals(intervals):
        first = min(cells - 1, math.floor(start / length * cells)) if length > 0 else 0
        last = max(first + 1, math.ceil(stop / length * cells)) if length > 0 else cells
        filled[first:last] = [True] * (min(last, cells) - first)
    return filled


def usage_line(answer: Answer, topk: int | None) -> str:
    """Frames, tokens, attention and seconds of an answer on one line; `topk` keys are what the model was trained on."""
    usage, frames = answer.usage, sum(plan.get("frames", len(plan.get("timestamps", ()))) for plan in answer.plan)
    parts = [plural(frames, "frame")] if frames else []
    parts.append(f"{plural(usage.prompt_tokens, 'prompt token')} ({usage.media_tokens:,} visual)")
    cut = {"length": ", cut at --max-tokens", "loop": ", stopped: it repeated itself"}.get(answer.finish_reason, "")
    parts.append(f"{usage.completion_tokens:,} generated{cut}")
    attention = f"{answer.attention} attention"
    context = usage.prompt_tokens + usage.completion_tokens
    if answer.attention == "dense" and topk is not None and context > topk:
        attention += f" (over more than the {topk:,} tokens that {answer.model} was trained to select)"
    parts.append(attention)
    parts.append(f"{sum(answer.seconds.values()):.1f} s")
    return one_line(" · ".join(parts))


# Plans


def print_plans(result: Mapping[str, Any]) -> None:
    """A table of the plans of `keye plan`, the times of their frames, and the share of the context."""
    console = stdout()
    console.print(plan_table(result["media"]))
    for plan in result["media"]:
        if plan["kind"] == "video":
            console.print(f"{one_line(plan['name'])}: frames at {listed_times(plan['timestamps'])} s", soft_wrap=True)
    share = result["share_of_context"]
    console.print(
        f"{plural(result['visual_tokens'], 'visual token')}, {share:.1%} of the {result['context']:,} tokens of "
        f"{one_line(result['model'])}'s context; the times of frames, the question and the answer come on top",
        soft_wrap=True,
    )
    if share >= 1:
        console.print("This does not fit: lower --fps, --max-frames or --max-pixels.", style="bold")
    if needs := result.get("needs"):
        console.print(one_line(needs), style="yellow", soft_wrap=True)
    if prediction := result.get("prediction"):
        console.print()
        print_prediction(prediction)


def print_prediction(prediction: Mapping[str, Any]) -> None:
    """What a request will take: memory by part beside what is free, seconds by phase."""
    console = stdout()
    table = Table(box=None, pad_edge=False)
    for name, justify in (("memory", "left"), ("", "right"), ("  time", "left"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    sizes = {**prediction["bytes"], "in all": prediction["total_bytes"]}
    memory = [(name, format_bytes(nbytes)) for name, nbytes in sizes.items()]
    seconds = [(f"  {name}", f"{value:,.2f} s") for name, value in prediction["seconds"].items()]
    if prediction["generate_tokens_per_second"] is not None:
        seconds.append(("  generation", f"{prediction['generate_tokens_per_second']:,.1f} tokens/s"))
    for left, right in zip_longest(memory, seconds, fillvalue=("", "")):
        table.add_row(*left, *right)
    console.print(table)
    free = prediction["free_bytes"]
    if free is not None:
        verdict = "fits" if prediction["fits"] else f"does not fit; {prediction['what_fits']}"
        console.print(f"{format_bytes(free)} are free on {prediction['device']}: it {verdict}", soft_wrap=True)
    for sentence in prediction["notes"]:
        console.print(one_line(sentence), style="yellow", soft_wrap=True)


def print_errors(errors: Mapping[str, float]) -> None:
    """How far a prediction was off."""
    names = {"first_token": "time to the first token", "token": "time of a token"}
    off = [f"{names[name]} {abs(error):.0%} {'longer' if error > 0 else 'shorter'}" for name, error in errors.items()]
    stdout().print(f"against the prediction: {', '.join(off) or 'nothing was predicted'}", soft_wrap=True)


def plan_table(plans: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each medium."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for name in ("length", "source", "frames", "size", "tokens/frame", "tokens"):
        table.add_column(name, justify="right")
    for plan in plans:
        video = plan["kind"] == "video"
        source = f"{plan['source_width']}x{plan['source_height']}"
        frames = plan["frames"] if video else 1
        table.add_row(
            one_line(plan["name"]), format_seconds(plan["duration"]) if video else "image",
            f"{source}, {plan['native_fps']:.4g} fps" if video else source, str(frames),
            f"{plan['width']}x{plan['height']}", f"{plan['visual_tokens'] // frames:,}", f"{plan['visual_tokens']:,}",
        )  # fmt: skip
    return table


def listed_times(times: Sequence[float]) -> str:
    """Times with one decimal, the middle of a long list left out."""
    listed = [f"{time:.1f}" for time in times]
    if len(listed) > MAX_TIMES:
        listed = [*listed[: MAX_TIMES // 2], "...", *listed[-MAX_TIMES // 2 :]]
    return " ".join(listed)


# Indexes


def print_index(info: IndexInfo) -> None:
    """What `keye index` wrote, in a line."""
    frames, tokens = plural(info.plan.get("frames", 0), "frame"), plural(info.tokens, "token")
    print_line(
        f"wrote {info.path}: {frames} · {tokens} ({info.media_tokens:,} visual) · {info.kv} · "
        f"{format_bytes(info.bytes)} · {sum(info.seconds.values()):.1f} s"
    )


def print_held(header: Mapping[str, Any]) -> None:
    """A table of the header of an index."""
    model, video, plan = header["model"], header["video"], header["video"]["plan"]
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = [
        ("video", str(plan.get("name", "pictures in memory"))),
        ("length", format_seconds(plan["duration"]) if is_number(plan.get("duration")) else "unknown"),
        ("frames", f"{len(video['timestamps']):,}"),
        ("options", ", ".join(f"{name} {value}" for name, value in video["options"].items()) or "none"),
        ("sha256", str(video.get("sha256"))),
        ("model", f"{model['name']}, {model['dtype']}, {header['attention']} attention"),
        ("tokens", f"{header['tokens']:,} ({header['visual_tokens']:,} visual)"),
        ("formats", ", ".join(f"{name} {kind}" for name, kind in header["formats"].items())),
        ("bytes", f"{header['bytes']:,} ({header['bytes_per_token']:,} a token)"),
        ("keye", str(header["keye"])),
    ]
    for name, value in rows:
        table.add_row(name, one_line(value))
    stdout().print(table)


def print_search_index(contents: Mapping[str, Any]) -> None:
    """A table of what a search index holds."""
    model, source, plan = contents["model"], contents["source"], contents["plan"]
    table = Table(box=None, pad_edge=False, show_header=False)
    levels = [
        f"{plural(level['windows'], 'window')} of a frame every {level['spacing']:g} s"
        + ", unfinished" * (not level["complete"])
        for level in contents["levels"]
    ]
    rows = [
        ("video", str(source["name"])),
        ("length", format_seconds(source["duration"])),
        ("frames", f"{contents['frames']:,} of {plan['width']} x {plan['height']} pixels, {plan['frames']} a window"),
        ("windows", "; ".join(levels)),
        ("scenes", f"{plural(contents['cuts'], 'cut')} in {format_seconds(contents['scenes_until'])}"),
        ("identity", str(source["identity"])),
        ("model", f"{model['name']}, {model['dtype']}, {contents['attention']} attention"),
        ("tokens", f"{contents['tokens']:,}"),
        ("formats", ", ".join(f"{name} {kind}" for name, kind in contents["formats"].items()) or "no windows yet"),
        ("bytes", f"{contents['bytes']:,}"),
        ("keye", str(contents["keye"])),
    ]
    for name, value in rows:
        table.add_row(name, one_line(value))
    stdout().print(table)


# Progress


@contextmanager
def progress_bar(title: str, *, notes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error that the yielded function moves to (done, total). Where that is not a terminal, nothing,
    or with `notes` a line for each tenth."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, last_tenth = stderr(), -1
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            nonlocal last_tenth
            bar.update(task, completed=done, total=total)
            tenth = done * 10 // total if total else 0
            if notes and not console.is_terminal and tenth > last_tenth >= 0:
                left = bar.tasks[0].time_remaining
                note(f"{done:,} of {total:,}" + (f", {left:,.0f} s left" if left else ""))
            last_tenth = max(tenth, last_tenth)  # progress of an earlier run is not reported

        yield advance


def time_left(seconds: float, words: Callable[..., str] = in_english) -> str:
    """Seconds left for people, rounded up: "about 40 s left", "6 min left"."""
    if seconds < 90:
        return words("left.seconds", seconds=max(1, math.ceil(seconds / 5) * 5 if seconds > 10 else math.ceil(seconds)))
    if seconds < 5400:
        return words("left.minutes", minutes=math.ceil(seconds / 60))
    return words("left.hours", hours=f"{seconds / 3600:.1f}")


class Share:
    """How much of the work before a reply is done: visual tokens encoded and prompt tokens computed, together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin = clock, clock()
        self._done: dict[str, tuple[int, int]] = {}
        self.share = 0.0

    def add(self, phase: str, done: int, total: int) -> None:
        """Takes the state of a phase; the share never falls."""
        self._done[phase] = (done, total)
        done, total = (sum(counts) for counts in zip(*self._done.values(), strict=True))
        if total:
            self.share = max(self.share, done / total)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def __str__(self) -> str:
        """The share, and the time left once it can be known."""
        if not self.share or self.seconds < FIRST_SECONDS:
            return f"{self.share:.0%}"
        return f"{self.share:.0%}, {time_left(self.seconds * (1 - self.share) / self.share)}"


@contextmanager
def watching(title: str) -> Iterator[Callable[[Step], None]]:
    """Yields a callback that displays the engine's progress on one request or index; the bar disappears when the block
    ends, or once all is computed, so that the reply can be printed."""
    console, share = stderr(), Share()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    last_line = 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, left="")

        def show(step: Step) -> None:
            nonlocal last_line
            if step.phase == "media":  # of unknown length
                return
            share.add(step.phase, step.done, step.total)
            if console.is_terminal:
                bar.update(task, completed=share.share, total=1.0, left=str(share).partition(", ")[2])
                if share.share == 1.0:
                    bar.stop()
            elif share.seconds - last_line >= LINE_SECONDS and share.share < 1.0:
                last_line = share.seconds
                note(f"{title}: {share}")

        yield show
