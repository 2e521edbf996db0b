"""`keye watch`: reports when something happens in a camera's picture, an RTSP stream, or a file played live."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.commands.shared.options import Positive
from keye.errors import KeyeError
from keye.units import plural

if TYPE_CHECKING:
    from keye.media.live import LiveSource
    from keye.sessions.alerts import Webhook
    from keye.sessions.watch import Watcher, WatchEvent
    from keye.sessions.watch_source import WatchCounts

#: Most pixels of a frame that is watched, for models that take larger ones.
MOST_PIXELS = 640 * 360


@click.command(context_settings=options.CONTEXT)
@click.argument("source")
@click.argument("event", metavar='"EVENT"')
@click.option("--webhook", metavar="URL", help="Post each report as JSON to this address, and to no other.")
@click.option("--clips", type=options.PATH, metavar="FOLDER", help="Write a clip of each event to this folder.")
@click.option(
    "--digest",
    type=options.PATH,
    metavar="FILE",
    help="Add each event to a Markdown or HTML file for the day: watch.md becomes watch-2026-11-30.md.",
)
@click.option(
    "--cooldown",
    type=float,
    metavar="SECONDS",
    help="Report the event again only so long after it ended.  [default: 30]",
)
@click.option("--every", type=Positive(), metavar="SECONDS", help="Time between two questions.  [default: 1]")
@click.option("--threshold", type=float, metavar="P", help="Probability from which on it counts.  [default: 0.5]")
@click.option("--rate", type=Positive(), metavar="N", help="Frames a second that are looked at.  [default: 2]")
@click.option(
    "--window", "window_frames", type=options.COUNT, metavar="N", help="Frames that a question is about.  [default: 16]"
)
@click.option(
    "--speed",
    type=float,
    metavar="X",
    default=1.0,
    show_default=True,
    help="Play a file X times as fast; 0: as fast as the model can.",
)
@click.option("--allow-private-urls", is_flag=True, help="Open addresses of this machine and local networks.")
@options.running
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@options.debug
def watch(
    source: str, event: str, webhook: str | None, clips: Path | None, digest: Path | None, speed: float, as_json: bool,
    **arguments: Any,
) -> None:  # fmt: skip
    """Report when an event begins and ends in a live source, until Ctrl-C.

    SOURCE is an RTSP address, a camera's device file, or a video file, which is played as if it were live. A model sees
    the last seconds again and again; an event is reported once a second question about it alone has agreed.

    \b
    keye watch rtsp://camera.local/stream "a person at the door" --allow-private-urls --webhook http://localhost:9000
    keye watch video.mp4 "the red circle" --speed 4 --clips found --digest watch.md
    """
    from keye.commands.shared import inputs
    from keye.config.media import FetchLimits
    from keye.media.live import open_live
    from keye.media.source.fetch import fetch_source
    from keye.sessions.alerts import Webhook, check_webhook
    from keye.sessions.search.looks import Asker
    from keye.sessions.search.questions import check_event
    from keye.sessions.watch import Watcher, WatchOptions
    from keye.sessions.watch_source import FrameQueue, watch_source

    names = ("rate", "window_frames", "every", "threshold", "cooldown")
    settings = WatchOptions(**{name: arguments[name] for name in names if arguments[name] is not None})
    event = check_event(event)
    if not 0 <= speed <= 1000:
        raise KeyeError("--speed must be 0 to 1000")
    if webhook is not None:
        check_webhook(webhook)
    _check_outputs(clips, digest)
    private = bool(arguments["allow_private_urls"])
    live = open_live(
        source, lambda name: fetch_source(name, limits=FetchLimits(allow_private=private)), rate=settings.rate,
        max_pixels=MOST_PIXELS, speed=speed, allow_private=private,
    )  # fmt: skip
    model = inputs.load_model(arguments)
    lossless = speed == 0 and not live.is_endless
    watcher = Watcher(Asker(model.engine, event), event, live.name, settings)
    hook = Webhook(webhook, inputs.note) if webhook is not None else None
    frames = FrameQueue(live, lossless=lossless, on_note=inputs.note)
    inputs.note(f"watching {live.name} for {event}; Ctrl-C ends")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for report in watch_source(frames, watcher, lossless=lossless):
                handle(report, live, clips, digest, hook, as_json=as_json)
        for report in watcher.finish():
            handle(report, live, clips, digest, hook, as_json=as_json)
    finally:
        frames.close()
        if hook is not None:
            hook.close()
    inputs.note(summary(watcher, frames.counts, hook))


def _check_outputs(clips: Path | None, digest: Path | None) -> None:
    """`KeyeError` for places that cannot be written, before the model is loaded."""
    if clips is not None and clips.exists() and not clips.is_dir():
        raise KeyeError(f"{clips} is a file: give a folder for --clips")
    if digest is not None and not digest.absolute().parent.is_dir():
        raise KeyeError(f"{digest} cannot be written: name a file in a folder that exists")


def handle(
    report: WatchEvent, live: LiveSource, clips: Path | None, digest: Path | None, hook: Webhook | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Sends a report everywhere: the webhook first, which people wait for. What cannot be written is a note."""
    from keye.chat.times import format_seconds
    from keye.commands.shared import inputs, show
    from keye.sessions.alerts import append_digest

    now = datetime.datetime.now().astimezone()
    report = replace(report, time=now.isoformat(timespec="milliseconds"))
    if report.kind == "end" and clips is not None:
        assert report.end is not None
        try:
            name = f"{now:%Y%m%d-%H%M%S}-{report.number:03d}"
            path = live.write_clip(report.start, report.end, clips, name)
            report = replace(report, clip=None if path is None else str(path))
        except (KeyeError, OSError) as error:
            inputs.note(f"no clip was written: {error}")
    values = report.to_dict()
    if hook is not None:
        hook.post(values)
    if as_json:
        show.print_json(values)
    elif report.kind == "start":
        show.print_line(
            f"{now:%H:%M:%S} {report.event}: from {format_seconds(report.start)} ({report.probability:.0%})"
        )
    else:
        assert report.end is not None
        clip = f", {report.clip}" if report.clip else ""
        show.print_line(f"{now:%H:%M:%S} {report.event}: until {format_seconds(report.end)}{clip}")
    if report.kind == "end" and digest is not None:
        try:
            append_digest(digest, values, now)
        except KeyeError as error:
            inputs.note(str(error))


def summary(watcher: Watcher, counts: WatchCounts, hook: Webhook | None) -> str:
    """What was done, in a sentence."""
    parts = [f"{plural(watcher.reported, 'event')}", f"{plural(watcher.rejected, 'doubtful one')} not confirmed",
             f"{plural(watcher.questions, 'question')} about {plural(counts.frames, 'frame')}"]  # fmt: skip
    if counts.unseen:
        parts.append(f"{counts.unseen} frames came faster than the model is")
    if counts.reconnects:
        parts.append(f"opened again {plural(counts.reconnects, 'time')}")
    if hook is not None:
        lost = hook.failed + hook.dropped
        parts.append(f"{plural(hook.delivered, 'report')} delivered" + (f", {lost} not" if lost else ""))
    return "; ".join(parts)
