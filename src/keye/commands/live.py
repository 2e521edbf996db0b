"""`keye live`: a file played as if it were going on, with a question asked again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options
from keye.commands.shared.options import VIDEO_OPTIONS, Positive, pick_set
from keye.errors import KeyeError

if TYPE_CHECKING:
    from PIL import Image

    from keye.sessions.live import LiveSession


@click.command(context_settings=options.CONTEXT)
@click.argument("video")
@click.argument("question", metavar='"QUESTION"')
@click.option("--every", type=Positive(), default=5.0, show_default=True, help="Seconds of video between two answers.")
@click.option("--keep", type=click.Choice(["all", "recent"]), default="all", show_default=True,
              help="When the context is full: stop, or forget the oldest frames.")  # fmt: skip
@options.sampling_frames
@options.sampling_text
@options.running
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@options.debug
def live(video: str, question: str, every: float, keep: str, as_json: bool, **settings: Any) -> None:
    """Play a video as if it were live, and ask about what was seen so far.

    Frames are computed once, as they come; each answer sees those before it. The file is read as fast as it can be.

    \b
    keye live video.mp4 "what is visible now?" --every 5
    keye live video.mp4 "how often did the light change?" --every 60 --keep recent --json
    """
    from keye.chat.times import format_seconds
    from keye.commands.shared import inputs, show
    from keye.media.source.fetch import is_index

    medium = inputs.only_video(video, settings)
    if is_index(medium.source):  # type: ignore[arg-type]
        raise KeyeError(f"{video} is an index and holds no frames: give the video itself")
    model = inputs.load_model(settings)
    reply_options = inputs.reply_options(model, {**settings, "attention": None})
    session = model.live(keep=keep, **pick_set(settings, VIDEO_OPTIONS))  # type: ignore[arg-type]  # one of its choices
    for seconds, frames, times in moments(session, medium.source, every):
        session.append(frames, times)
        answer = session.ask(question, **{name: value for name, value in reply_options.items() if name != "attention"})
        if as_json:
            seen = {"frames": session.frames, "dropped": session.dropped}
            show.print_json({"time": seconds, **seen, **answer.to_dict()})
        else:
            show.print_line(f"{format_seconds(seconds)}  {answer.text}")


def moments(
    session: LiveSession, video: object, every: float
) -> Iterator[tuple[float, list[Image.Image], list[float]]]:
    """The frames of each `every` seconds of a video with their times, and the time of the last of them; stretches
    without frames are left out."""
    from PIL import Image

    for _, pairs in itertools.groupby(session.frames_of(video), key=lambda pair: int(pair[1] // every)):
        frames, times = zip(*pairs, strict=True)
        yield times[-1], [Image.fromarray(frame) for frame in frames], list(times)
