"""`keye scenes`: the shots of a video, from the hard cuts between them, with pictures and titles on request."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.commands.shared.options import Positive
from keye.errors import KeyeError
from keye.units import plural

if TYPE_CHECKING:
    from keye.media.scenes import Scenes
    from keye.media.source.fetch import Source

#: Most pixels of a thumbnail.
THUMBNAIL_PIXELS = 320 * 180
COLUMNS = ("scene", "start", "end", "duration", "title")


@click.command(context_settings=options.CONTEXT)
@click.argument("video")
@click.option("--titles", is_flag=True, help="Ask the model for a title of each shot.")
@click.option("--thumbnails", type=options.PATH, metavar="FOLDER", help="Write a picture of each shot to this folder.")
@click.option(
    "--threshold",
    type=float,
    metavar="SHARE",
    help="Share of the picture that must be new at a cut, between 0 and 1.  [default: 0.45]",
)
@click.option(
    "--min-length", type=Positive(), metavar="SECONDS", help="Join shorter shots with the one before.  [default: 0]"
)
@click.option("--track", type=options.COUNT, metavar="N", help="The video track to read.  [default: as players choose]")
@click.option("--allow-private-urls", is_flag=True, help="Open http addresses of this machine and local networks.")
@options.overwrite
@options.running
@click.option("--csv", "as_csv", is_flag=True, help="Print a table of comma-separated values.")
@options.as_json
@options.debug
def scenes(
    video: str, titles: bool, thumbnails: Path | None, as_csv: bool, as_json: bool, overwrite: bool, **arguments: Any
) -> None:  # fmt: skip
    """List the shots of a video, found by the hard cuts between them.

    Every frame is decoded; fades, flashes and fast motion are not cuts. No model is loaded without --titles.

    \b
    keye scenes video.mp4
    keye scenes video.mp4 --thumbnails pictures --titles --json
    """
    from keye.commands.shared import inputs, show
    from keye.media.scenes import find_scenes
    from keye.media.source.fetch import fetch_source, is_index

    if as_csv and as_json:
        raise KeyeError("--csv and --json exclude each other: give one of them")
    if thumbnails is not None and thumbnails.exists() and not thumbnails.is_dir():
        raise KeyeError(f"{thumbnails} is a file: give a folder for --thumbnails")
    medium = inputs.only_video(video, {**dict.fromkeys(options.VIDEO_OPTIONS), **arguments})
    source = fetch_source(medium.source)  # type: ignore[arg-type]  # a video that is a file
    if is_index(source):
        raise KeyeError(f"{video} is an index and holds no frames: give the video itself")
    model = inputs.load_model(arguments) if titles else None
    settings = {name: arguments[name] for name in ("threshold", "min_length", "track") if arguments[name] is not None}
    with show.progress_bar("looking for cuts", notes=True) as advance:
        result = find_scenes(source, on_progress=advance, **settings)
    names: Sequence[str] = [""] * len(result.shots)
    if model is not None:
        with show.progress_bar("titles", notes=True) as advance:
            names = model.title_scenes(source, result, track=arguments["track"], on_progress=advance)
    pictures = []
    if thumbnails is not None:
        pictures = write_thumbnails(source, result, thumbnails, track=arguments["track"], overwrite=overwrite)
    if as_json:
        rows = [
            {"start": shot.start, "end": shot.end, "duration": round(shot.duration, 6)}
            | ({"title": name} if titles else {})
            for shot, name in zip(result.shots, names, strict=True)
        ]
        show.print_json({**result.to_dict(), "scenes": rows, "thumbnails": [str(path) for path in pictures]})
    elif as_csv:
        print(to_csv(result, names), end="")
    else:
        for line in to_lines(result, names):
            show.print_line(line)
        if pictures:
            show.print_line(f"wrote {plural(len(pictures), 'picture')} to {thumbnails}")


def to_csv(result: Scenes, titles: Sequence[str]) -> str:
    """A row for each shot; times in seconds."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for number, (shot, title) in enumerate(zip(result.shots, titles, strict=True), 1):
        # A program for tables would take a title that begins like a formula for one.
        safe = f"'{title}" if title[:1] in "=+-@\t\r" and title else title
        table.writerow((number, f"{shot.start:.3f}", f"{shot.end:.3f}", f"{shot.duration:.3f}", safe))
    return out.getvalue()


def to_lines(result: Scenes, titles: Sequence[str]) -> Iterator[str]:
    """A line for each shot, for people."""
    from keye.chat.times import format_seconds

    shots = result.shots
    yield f"{plural(len(shots), 'shot')}, {plural(len(result.cuts), 'cut')}"
    width = len(str(len(shots)))
    for number, (shot, title) in enumerate(zip(shots, titles, strict=True), 1):
        span = f"{format_seconds(shot.start):>9} to {format_seconds(shot.end):>9}"
        yield f"{number:{width}}  {span}  ({format_seconds(shot.duration)})  {title}".rstrip()


def write_thumbnails(source: Source, result: Scenes, folder: Path, *, track: int | None, overwrite: bool) -> list[Path]:
    """Writes a JPEG picture of each shot; files appear when all are complete."""
    from PIL import Image

    from keye.commands.shared import show
    from keye.files import MARK, check_output, complete_file, has_mark, unwritable
    from keye.media.scenes import middle_frames

    stem = re.sub(r"[^\w.-]+", "-", Path(source.name).stem)[:80] or "video"
    paths = [folder / f"{stem}-{n:04d}-{shot.start:.1f}s.jpg" for n, shot in enumerate(result.shots, 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            check_output(path, has_mark, overwrite=overwrite)
        pictures = middle_frames(source, result, most_pixels=THUMBNAIL_PIXELS, track=track)
        with show.progress_bar("pictures", notes=True) as advance, ExitStack() as drafts:
            for number, (path, picture) in enumerate(zip(paths, pictures, strict=True), 1):
                draft = drafts.enter_context(complete_file(path))
                Image.fromarray(picture).save(draft, "JPEG", quality=85, comment=MARK)
                advance(number, len(paths))
    except OSError as error:
        raise unwritable(folder, error) from None
    return paths
