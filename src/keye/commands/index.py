"""`keye index`: a video read once, kept in a file that questions start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from keye.commands.shared import options
from keye.commands.shared.outputs import check_not_input
from keye.errors import KeyeError
from keye.units import format_bytes


@click.command(context_settings=options.CONTEXT)
@click.argument("video", metavar="VIDEO")
@click.option("-o", "--output", type=options.PATH, metavar="FILE", help="The index to write.")
@click.option("--check", is_flag=True, help="Compare all of an index, named in place of VIDEO, with its checksum.")
@options.overwrite
@options.sampling_frames
@options.template
@options.attention
@options.storing
@options.running
@options.as_json
@options.debug
def index(video: str, output: Path | None, check: bool, overwrite: bool, as_json: bool, **arguments: Any) -> None:
    """Read a video once and keep what the model stored of it in a file.

    keye ask and keye ground take the file in place of the video and answer at once, again and again. It suits only the
    model that wrote it, and keeps frames and number formats as they were chosen here. keye inspect shows what is in it.

    \b
    keye index talk.mp4 -o talk.keye
    keye index talk.mp4 -o talk.keye --fps 1 --kv int8
    keye ask talk.keye "what is on the board?"
    keye index --check talk.keye
    """
    if check:
        _check(Path(video), output, as_json)
        return
    if output is None:
        raise KeyeError("name the index to write with -o, as in: keye index talk.mp4 -o talk.keye")
    from keye.cache.index_file import check_index_output
    from keye.commands.shared import inputs, show

    medium = inputs.only_video(video, arguments)
    check_not_input(output, "-o", [medium.source])
    check_index_output(output, overwrite=overwrite)
    model = inputs.load_model(arguments)
    with show.watching("watching the video") as on_progress:
        info = model.index(
            medium, output, attention=arguments["attention"], overwrite=overwrite, on_progress=on_progress
        )
    if as_json:
        show.print_json(info.to_dict())
    else:
        show.print_index(info)


def _check(file: Path, output: Path | None, as_json: bool) -> None:
    from keye.cache.index_file import check_full
    from keye.cache.segments import check_segments, is_segmented
    from keye.commands.shared import show
    from keye.sessions.search.headers import IndexContents

    if output is not None:
        raise KeyeError("--check reads an index and writes none: leave -o out")
    with show.progress_bar("checking") as advance:
        if is_segmented(file):
            segments = check_segments(file, advance)
            tokens = sum(window.tokens for window in IndexContents.read(file, segments).windows)
            size = file.stat().st_size
        else:
            checked = check_full(file, advance)
            tokens, size = checked.length, checked.size
    if as_json:
        show.print_json({"index": str(file), "tokens": tokens, "bytes": size, "sound": True})
    else:
        show.print_line(f"{file} is sound: {tokens:,} tokens, {format_bytes(size)}")
