"""`--subtitles` and `--transcribe`: the lines that are searched together with the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keye.chat.messages import Medium
from keye.commands.shared.inputs import note, open_transcriber
from keye.commands.shared.show import progress_bar
from keye.errors import MediaError
from keye.media.source.fetch import Source, is_index


def find_subtitles(medium: Medium, options: Mapping[str, Any]) -> object:
    """What `--subtitles` names. With `--transcribe` the speech of a video that has none is transcribed instead."""
    service, source = open_transcriber(options), medium.source
    if service is None or options["subtitles"] is not None or not isinstance(source, Source) or is_index(source):
        return options["subtitles"]
    from keye.media.speech import transcribe
    from keye.media.subtitles import load_subtitles

    if (own := load_subtitles(source)) is not None:
        return own
    try:
        with progress_bar("transcribing") as advance:
            return transcribe(source, service, on_progress=lambda done, total: advance(round(done), round(total)))
    except MediaError as error:  # it has no sound: the picture is searched alone
        note(f"nothing is transcribed: {error}")
        return None
