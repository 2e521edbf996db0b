"""`keye ask --evidence`: which frames an answer rests on, as a picture or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from keye.commands.shared import outputs
from keye.files import check_output, has_mark, is_json_with, output_file

if TYPE_CHECKING:
    from PIL import Image

    from keye.api import Keye
    from keye.chat.messages import Medium
    from keye.sessions.answer import Answer


#: What our files of JSON hold.
_NAMES = frozenset({"question", "answer", "intervals", "media", "steps"})


def check_evidence(path: Path, media: Sequence[Medium], overwrite: bool) -> None:
    """`KeyeError` where `--evidence` cannot work, before a model is loaded."""
    outputs.check_suffix(path, "--evidence", (*outputs.PICTURE_FORMATS, ".json"))
    outputs.check_not_input(path, "--evidence", [medium.source for medium in media])
    check_output(path, _is_own, overwrite=overwrite)


def _is_own(path: Path) -> bool:
    """Whether evidence was written to this file before."""
    return is_json_with(path, _NAMES) if path.suffix.lower() == ".json" else has_mark(path)


def write_evidence(model: Keye, media: Sequence[Medium], question: str, answer: Answer, path: Path) -> None:
    """Writes the evidence of an answer; a picture shows the frames that were selected most, decoded again."""
    assert answer.evidence is not None
    if path.suffix.lower() == ".json":
        data = {"question": question, "answer": answer.text, "intervals": answer.intervals, **answer.evidence.to_dict()}
        with output_file(path) as draft:
            draft.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    from keye.sessions.pictures import THUMBNAILS, draw_evidence

    thumbnails = {
        place: _thumbnails(model, media, place, medium.top(THUMBNAILS))
        for place, medium in enumerate(answer.evidence.media)
        if medium.kind == "video"
    }
    picture = draw_evidence(answer.evidence, question, answer.text, answer.intervals, thumbnails)
    outputs.save_picture(picture, path)


def _thumbnails(model: Keye, media: Sequence[Medium], place: int, frames: Sequence[int]) -> dict[int, Image.Image]:
    """Pictures of frames of the medium at `place`, twice as large as they are shown at most. An index has none,
    nor has a list of pictures."""
    from keye.engine.media import plan_medium
    from keye.media.plan import VideoPlan
    from keye.media.source.fetch import Source, is_index
    from keye.sessions.pictures import read_thumbnails

    source = media[place].source
    if not isinstance(source, Source) or is_index(source):
        return {}
    videos = sum(medium.kind == "video" for medium in media)
    planned = plan_medium(media[place], model.processor, videos)
    plan = planned.plan
    if not isinstance(planned.source, Source) or not isinstance(plan, VideoPlan):
        return {}
    scale = min(1.0, 400 / plan.source_width)
    plan = replace(plan, width=round(plan.source_width * scale), height=round(plan.source_height * scale))
    return read_thumbnails(planned.source, plan, frames, model.processor.limits)
