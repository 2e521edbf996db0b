"""How a search looks: its progress, what it finds as it finds it, and the ranked moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from keye.chat.times import format_seconds
from keye.commands.shared.inputs import note, stderr
from keye.commands.shared.language import say
from keye.commands.shared.show import MAX_BAR, filled_cells, print_line, stdout, time_left
from keye.moments import FindProgress, FindResult, Moment, MomentsFound
from keye.units import one_line, plural

if TYPE_CHECKING:
    from keye.library.find import LibraryResult, LibrarySearch
    from keye.sessions.search.find import FindStream


def watch_search(stream: FindStream, name: str) -> FindResult:
    """Runs a search to its end under a bar on standard error; where that is not a terminal, with a line for each stage.
    Moments are listed as they are found."""
    console = stderr()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    stage, listed = None, set[str]()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(one_line(name), total=None, left="")
        for event in stream:
            if isinstance(event, FindProgress):
                left = "" if event.seconds_left is None else time_left(event.seconds_left, say)
                title = f"{one_line(name)}: {say(f'stage.{event.stage}')}"
                bar.update(task, description=title, completed=event.done, total=event.total or None, left=left)
                if event.stage != stage and not console.is_terminal:
                    note(title + (f", {left}" if left and event.stage == "index" else ""))
                stage = event.stage
            elif isinstance(event, MomentsFound):
                for moment in event.moments:
                    if moment.id not in listed and (moment.refined or moment.checked == "twice"):
                        listed.add(moment.id)
                        note(f"{one_line(name)}: {_span(moment)}")
    assert stream.result is not None
    return stream.result


def print_found(results: Sequence[FindResult], event: str, failed: Sequence[tuple[str, str]]) -> None:
    """The moments of each video, best first, what was looked at, and the files that could not be searched."""
    console = stdout()
    several = len(results) + len(failed) > 1
    for result in sorted(results, key=_best, reverse=True):
        if several:
            console.print(one_line(result.video), style="bold", soft_wrap=True)
        if not result.is_found:
            sure = "" if result.presence is None else say("presence", share=f"{result.presence:.0%}")
            print_line(say("missing", event=event) + sure)
        if result.moments and result.coverage.duration > 0:
            console.print(_bar(result, min(console.width, MAX_BAR + 24)), soft_wrap=True)
        for moment in result.moments:
            console.print(_line(moment), soft_wrap=True)
        if result.weaker:
            console.print(say("weaker"), style="dim")
        for moment in result.weaker:
            console.print(_line(moment), style="dim", soft_wrap=True)
        for item in result.notes:
            if item.code not in ("media", "scope"):  # those were noted when they were met
                note(item.text)
        console.print(_coverage_line(result), style="dim", soft_wrap=True)
    for file, error in failed:
        note(say("failed", file=file, error=error))


def watch_library_search(search: LibrarySearch) -> LibraryResult:
    """Runs a search in a library to its end under a bar; Ctrl-C ends it with the best so far."""
    console = stderr()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    best: Moment | None = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(say("library.coarse"), total=None, left="")
        try:
            for event in search.run():
                if isinstance(event, FindProgress):
                    left = "" if event.seconds_left is None else time_left(event.seconds_left, say)
                    title = say("library.coarse" if event.stage == "coarse" else "stage.close")
                    bar.update(task, description=title, completed=event.done, total=event.total or None, left=left)
                elif isinstance(event, MomentsFound) and event.moments and event.moments[0] != best:
                    best = event.moments[0]
                    note(say("library.best", file=one_line(best.file or ""), span=_span(best)))
        except KeyboardInterrupt:
            search.stop()
    return search.result()


def print_library_found(result: LibraryResult) -> None:
    """The moments over all videos, best first, and what of the library was searched."""
    console = stdout()
    if not result.is_found:
        print_line(say("missing", event=result.query))
    for moment in result.moments:
        console.print(Text(f"{one_line(moment.file or '')}"), _line(moment), soft_wrap=True)
    if result.weaker:
        console.print(say("weaker"), style="dim")
    for moment in result.weaker:
        console.print(Text(f"{one_line(moment.file or '')}"), _line(moment), style="dim", soft_wrap=True)
    for item in result.notes:
        if item.code not in ("media", "scope"):
            note(item.text)
    coverage = result.coverage
    for file, reason in coverage.missing:
        note(say("library.partly", file=one_line(file), reason=one_line(reason)))
    unit, seconds = ("hours", 3600) if coverage.duration >= 3600 else ("minutes", 60)
    times = {"searched": f"{coverage.searched / seconds:.1f}", "duration": f"{coverage.duration / seconds:.1f}"}
    share = coverage.scored_windows / max(1, coverage.windows)
    console.print(one_line(" · ".join((
        say(f"library.{unit}", **times),
        say("library.windows", share=f"{share:.0%}", windows=plural(coverage.windows, "window"),
            count=f"{coverage.windows:,}"),
        say("library.videos", videos=plural(coverage.close_videos, "video"), count=f"{coverage.close_videos:,}"),
        say("library.tokens", query=f"{coverage.query_tokens:,}"), say("seconds", seconds=f"{result.seconds:.1f}"),
    ))), style="dim", soft_wrap=True)  # fmt: skip


def _best(result: FindResult) -> tuple[bool, float]:
    return result.is_found, max((moment.probability or 0.0 for moment in result.moments), default=0.0)


def _span(moment: Moment) -> str:
    return say("span", start=format_seconds(moment.start), end=format_seconds(moment.end))


def _line(moment: Moment) -> Text:
    parts = [f"  {_span(moment)}  ({format_seconds(moment.end - moment.start)})"]
    if moment.probability is not None:
        parts.append(f"{moment.probability:.0%}")
    parts.append(say(f"checked.{moment.checked}"))
    if moment.on_cut is not None:
        parts.append(say(f"cut.{moment.on_cut}"))
    if moment.subtitle is not None:
        text, time = one_line(moment.subtitle.text), format_seconds(moment.subtitle.start)
        parts.append(say("subtitle", text=text, time=time))
    return Text(" · ".join(parts))


def _bar(result: FindResult, width: int) -> Text:
    """The video from its beginning to its end, with the moments filled in."""
    length = result.coverage.duration
    left, right = format_seconds(0.0), format_seconds(length)
    bar = Text(f"{left} ▕")
    spans = [(moment.start, moment.end) for moment in result.moments]
    for on in filled_cells(spans, length, max(10, min(MAX_BAR, width - len(left) - len(right) - 4))):
        bar.append("█" if on else "─", style="green" if on else "dim")
    return bar.append(f"▏ {right}")


def _coverage_line(result: FindResult) -> str:
    """What was looked at, in a line, so that silence is not taken for absence."""
    coverage = result.coverage
    spacing = max((span.spacing for span in coverage.seen if not span.close), default=None)
    if spacing is None:
        seen = say("seen.nothing")
    else:
        seen = say(
            "seen.part" if coverage.unseen else "seen.all", share=f"{coverage.share:.0%}", spacing=f"{spacing:g}"
        )
    return one_line(" · ".join((
        seen, say("places", places=plural(coverage.places, "place"), count=f"{coverage.places:,}"),
        say("frames", frames=plural(coverage.frames, "frame"), count=f"{coverage.frames:,}"),
        say("tokens", index=f"{coverage.index_tokens:,}", query=f"{coverage.query_tokens:,}"),
        say("seconds", seconds=f"{sum(result.seconds.values()):.1f}"),
    )))  # fmt: skip
