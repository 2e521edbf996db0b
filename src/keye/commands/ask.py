"""`keye ask`: a question about videos and images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from keye.commands import options
from keye.errors import KeyeError


@click.command(context_settings=options.CONTEXT)
@click.argument("words", nargs=-1, metavar='FILES... "QUESTION"')
@options.sampling_frames
@options.sampling_text
@options.attention
@options.running
@options.as_json
@options.debug
def ask(words: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Answer a question about videos and images.

    The last argument is the question; the files before it are videos or images. The answer is printed as it is written,
    then the time intervals in it on a timeline, then what it cost.

    \b
    keye ask video.mp4 "when is the red circle visible?"
    keye ask before.png after.png "what is different?"
    keye ask talk.mp4 "what is on the board?" --start 12:30 --end 14:00 --fps 1
    """
    files, question = split_words(words)
    from keye.commands import inputs, show

    media = inputs.open_media(files, given)
    model = inputs.load_model(given)
    stream = model.stream_ask(media, question, **inputs.reply_options(model, given))
    if as_json:
        show.print_json(show.run_quietly(stream).to_dict())
    else:
        show.print_answer(show.print_stream(stream), model)


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """Files and question; `KeyeError` when either is missing."""
    if not words:
        raise KeyeError('give a file and a question, as in: keye ask video.mp4 "what happens?"')
    *files, question = words
    if os.path.isfile(question):
        raise KeyeError(f"{question} is a file: put the question after the files, in quotes")
    if not files:
        raise KeyeError('there is no medium to ask about: put a video or an image before the question, as in: '
                        f'keye ask video.mp4 "{question[:60]}"')  # fmt: skip
    return files, question
