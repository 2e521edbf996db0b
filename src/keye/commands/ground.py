"""`keye ground`: when something happens in a video, and the clips that show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.units import plural

if TYPE_CHECKING:
    from keye.chat.messages import Medium
    from keye.chat.times import Interval


@click.command(context_settings=options.CONTEXT)
@click.argument("video")
@click.argument("event", metavar='"EVENT"')
@click.option("--clips", type=options.PATH, help="Write each found interval as a video file to this folder.")
@options.exporting
@options.overwrite
@options.sampling_frames
@options.sampling_text
@options.attention
@options.storing
@options.running
@options.no_scope_notes
@options.as_json
@options.debug
def ground(video: str, event: str, clips: Path | None, overwrite: bool, as_json: bool, **arguments: Any) -> None:
    """Find when something happens in a video, or in one that keye index has read.

    Prints the intervals and a timeline. Exit code 0 also when nothing was found.

    \b
    keye ground video.mp4 "the red circle"
    keye ground video.mp4 "the red circle" --clips found
    keye ground video.mp4 "the red circle" --export cut.xml --handles 1
    """
    from keye.commands.shared import inputs, show
    from keye.commands.shared.record import plan_files
    from keye.media.source.fetch import is_index

    if clips is not None and clips.exists() and not clips.is_dir():
        raise KeyeError(f"{clips} is a file: give a folder for --clips")
    inputs.silence_scope(arguments)
    medium = inputs.only_video(video, arguments)
    if clips is not None and is_index(medium.source):  # type: ignore[arg-type]
        raise KeyeError(f"{video} is an index and holds no frames: give the video itself for --clips")
    files = plan_files([medium], arguments, overwrite=overwrite)
    model = inputs.load_model(arguments)
    settings = inputs.reply_options(model, arguments)
    with show.watching("watching the video") as on_progress:
        answer = model.ground(medium, event, on_progress=on_progress, **settings)
    if not as_json:  # before the clips, which may fail
        if not answer.intervals:
            reply = "" if answer.text in ("", "[]") else f' (the model answered "{answer.text}")'
            show.print_line(f"Not found: {event}{reply}")
        show.print_answer(answer, model)
    clip_paths, exports = list[Path](), list[Path]()
    try:
        clip_paths += write_clips(medium, answer.intervals, clips, overwrite) if clips is not None else []
        question = model.ground_question(event)
        exports += files.write("keye ground", event, question, model, [medium], answer, settings)
    finally:  # the answer is not lost where a file cannot be written
        if as_json:
            named = {"exports": [str(path) for path in exports]} if exports else {}
            show.print_json({**answer.to_dict(), "clips": [str(path) for path in clip_paths], **named})
    for path in () if as_json else [*clip_paths, *exports]:
        show.print_line(f"wrote {path}")


def write_clips(
    medium: Medium, intervals: tuple[Interval, ...], folder: Path, overwrite: bool, prefix: str = ""
) -> list[Path]:
    """Cuts the intervals into files under a progress bar; names of files begin with `prefix`."""
    from keye.commands.shared import inputs, show
    from keye.config.media import media_options
    from keye.media.clips import cut_clips
    from keye.media.source.fetch import fetch_source

    if not intervals:
        return []
    source, settings = fetch_source(medium.source), media_options("video", medium.options)  # type: ignore[arg-type]
    with show.progress_bar("writing clips") as advance:
        clip_paths = cut_clips(
            source, intervals, folder, options=settings, progress=advance, overwrite=overwrite, prefix=prefix
        )
    if len(clip_paths) < len(intervals):
        beyond = plural(len(intervals) - len(clip_paths), "interval")
        inputs.note(f"no clip was written of {beyond} outside the video")
    return clip_paths
