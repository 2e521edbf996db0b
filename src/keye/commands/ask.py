"""`keye ask`: a question about videos and images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options, outputs
from keye.errors import KeyeError
from keye.files import check_output, has_mark, is_json_with, output_file

if TYPE_CHECKING:
    from PIL import Image

    from keye.api import Keye
    from keye.chat.messages import Medium
    from keye.chat.replies import Region
    from keye.moments import Moment
    from keye.sessions.answer import Answer

#: Seconds around a moment that was found which are asked about too.
_AROUND = 1.0
#: What our files of JSON hold.
_NAMES = frozenset({"question", "answer", "intervals", "media", "steps"})


@click.command(context_settings=options.CONTEXT)
@click.argument("words", nargs=-1, metavar='FILES... "QUESTION"')
@click.option("--draw", type=options.PATH, metavar="FILE",
              help="Write the picture with the places that the answer marks (.png, .jpg, .webp).")  # fmt: skip
@click.option("--evidence", type=options.PATH, metavar="FILE",
              help="Write which frames the answer rests on: a picture (.png, .jpg, .webp) or .json.")  # fmt: skip
@options.exporting
@click.option("--search", metavar='"EVENT"',
              help="Find this event in a long video first, as keye find does, and ask about that part.")  # fmt: skip
@options.overwrite
@click.option("--n", "choices", type=options.COUNT, metavar="N", help="Generate N replies; needs a temperature.")
@click.option("--logprobs", type=click.IntRange(0, 20), metavar="N",
              help="With --json: the probability of each token, beside those of N others.")  # fmt: skip
@click.option("--deterministic", is_flag=True, help="The same tokens whatever else is computed with them.")
@click.option("--estimate", is_flag=True, help="First predict memory and time; afterwards print how far off it was.")
@options.sampling_frames
@options.sampling_text
@options.prompting
@options.attention
@options.storing
@options.running
@options.no_scope_notes
@options.as_json
@options.debug
def ask(
    words: tuple[str, ...], draw: Path | None, evidence: Path | None, search: str | None, estimate: bool,
    choices: int | None, logprobs: int | None, deterministic: bool, overwrite: bool, tools: Path | None, as_json: bool,
    **arguments: Any,
) -> None:  # fmt: skip
    """Answer a question about videos and images.

    The last argument is the question; the files before it are videos, images, or an index of a video that keye index
    wrote. The answer is printed as it is generated, then the time intervals in it on a timeline, then what it cost.

    \b
    keye ask video.mp4 "when is the red circle visible?"
    keye ask before.png after.png "what is different?"
    keye ask talk.mp4 "what is on the board?" --start 12:30 --end 14:00 --fps 1
    keye ask lecture.mp4 "when is the second proof?" --evidence proof.png
    keye ask hours.mp4 "what color is the triangle?" --search "the red circle"
    keye ask street.jpg "where are the signs, and what do they say?" --model 1.5 --draw signs.png
    """
    names, question = split_words(words)
    if logprobs is not None and not as_json:
        raise KeyeError("--logprobs gives numbers for programs: add --json")
    from keye.commands.shared import inputs, show
    from keye.commands.shared.record import plan_files

    inputs.silence_scope(arguments)
    media = inputs.open_media(names, arguments)
    offered = inputs.read_tools(tools) if tools is not None else ()
    if draw is not None:
        check_drawing(draw, media, overwrite)
    if evidence is not None:
        check_evidence(evidence, media, overwrite)
    if search is not None:
        check_search(media, arguments)
    files = plan_files(media, arguments, overwrite=overwrite)
    prediction = _predict(media, {**arguments, "as_json": as_json}) if estimate else None
    model = inputs.load_model(arguments)
    moment = None
    if search is not None:
        media, moment = narrow_down(model, media[0], search)
        if moment is None:
            show.print_json({"search": search, "found": False}) if as_json else show.print_line(f"Not found: {search}")
            return
    settings = _settings(model, arguments, choices or 1) | {"logprobs": logprobs, "deterministic": deterministic}
    with show.watching("watching") as on_progress:
        stream = model.stream_ask(
            media, question, tools=offered, evidence=evidence is not None, on_progress=on_progress, **settings
        )
        first = "" if as_json else next(stream, "")
        answer = stream.finish() if as_json else None
    answer = answer or show.print_stream(stream, first)
    extra, is_drawn = dict[str, Any](), False
    if moment is not None:
        extra["moment"] = moment.to_dict()
    if prediction is not None:
        from keye.planning.question import errors_of

        errors = errors_of(prediction, answer.seconds, answer.usage.completion_tokens)
        extra["estimate"] = {**prediction, "errors": errors}
    try:
        is_drawn = write_picture(media, answer.regions, draw) if draw is not None else False
        extra |= {"drawn": str(draw) if is_drawn else None} if draw else {}
        if evidence is not None:
            write_evidence(model, media, question, answer, evidence)
        exports = files.write("keye ask", question, question, model, media, answer, settings)
        extra |= {"exports": [str(path) for path in exports]} if exports else {}
    finally:  # the answer is not lost where a file cannot be written
        if as_json:
            show.print_json({**answer.to_dict(), **extra})
    if as_json:
        return
    show.print_answer(answer, model)
    if answer.evidence is not None:
        show.print_evidence(answer.evidence)
    if prediction is not None:
        show.print_errors(extra["estimate"]["errors"])
    for path in ([draw] if is_drawn else []) + ([evidence] if evidence is not None else []) + exports:
        show.print_line(f"wrote {path}")


def _settings(model: Keye, arguments: Mapping[str, Any], choices: int) -> dict[str, Any]:
    """Options of the reply; `KeyeError` for several at temperature 0."""
    from keye.commands.shared import inputs

    settings = inputs.reply_options(model, arguments)
    if choices > 1 and model.runtime.sampling_params(temperature=settings.get("temperature")).temperature == 0:
        raise KeyeError(f"--n {choices} generates the same reply each time at temperature 0: add --temperature 1")
    return {**settings, "n": choices}


def check_search(media: Sequence[Medium], arguments: Mapping[str, Any]) -> None:
    """`KeyeError` where `--search` cannot work, before a model is loaded."""
    from keye.media.source.fetch import Source, is_index

    if len(media) != 1 or media[0].kind != "video" or not isinstance(media[0].source, Source):
        raise KeyeError("--search finds the part of one video to ask about: name a single video")
    if is_index(media[0].source):
        raise KeyeError(f"{media[0].source.name} is an index, of which no part can be chosen: give the video itself")
    for name in ("fps", "nframes", "min_frames", "max_frames", "video_total_pixels", "strict_official"):
        if arguments[name] is not None:
            raise KeyeError(f"--search chooses frames itself: leave {options.flag(name)} out")


def narrow_down(model: Keye, medium: Medium, event: str) -> tuple[list[Medium], Moment | None]:
    """The medium with the part that shows an event best, and that moment; None where it was not found."""
    from keye.commands.shared.show_find import watch_search

    result = watch_search(model.stream_find(medium, event), medium.source.name)  # type: ignore[attr-defined]
    if not result.is_found:
        return [medium], None
    moment = result.moments[0]
    start = max(moment.start - _AROUND, medium.options.get("video_start") or 0.0)
    end = min(moment.end + _AROUND, medium.options.get("video_end") or result.coverage.duration)
    return [replace(medium, options={**medium.options, "video_start": start, "video_end": end})], moment


def _predict(media: Sequence[Medium], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction, which is also printed unless as JSON."""
    from keye.commands.shared import inputs, show
    from keye.media.source.fetch import Source, is_index
    from keye.planning.question import predict_question

    for medium in media:
        if isinstance(medium.source, Source) and is_index(medium.source):
            raise KeyeError(f"{medium.source.name} is an index, computed already: leave --estimate out")
    prediction = predict_question(
        media, inputs.find_model(arguments["model"], arguments["mmproj"], weights=False), arguments
    )
    if not arguments.get("as_json"):
        show.print_prediction(prediction)
    return prediction


def check_drawing(path: Path, media: Sequence[Medium], overwrite: bool) -> None:
    """`KeyeError` where `--draw` cannot work, before a model is loaded."""
    outputs.check_suffix(path, "--draw", outputs.PICTURE_FORMATS)
    outputs.check_not_input(path, "--draw", [medium.source for medium in media])
    check_output(path, has_mark, overwrite=overwrite)
    if len(media) != 1 or media[0].kind != "image":
        raise KeyeError("--draw marks places in one image: ask about a single image, or leave --draw out")


def write_picture(media: Sequence[Medium], regions: Sequence[Region], path: Path) -> bool:
    """Writes the image with its marks; notes instead that there are none, and returns whether it wrote."""
    from keye.commands.shared.inputs import note
    from keye.media.image import read_image
    from keye.sessions.pictures import draw_regions

    if not any(region.points for region in regions):
        note(f"the answer marks no place, so {path} was not written")
        return False
    drawn = draw_regions(read_image(media[0].source, planned=True), regions)  # type: ignore[arg-type]
    outputs.save_picture(drawn, path)
    return True


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """Files and question; `KeyeError` when either is missing."""
    if not words:
        raise KeyeError('give a file and a question, as in: keye ask video.mp4 "what happens?"')
    *files, question = words
    if os.path.isfile(question):
        raise KeyeError(f"{question} is a file: put the question after the files, in quotes")
    if not files:
        raise KeyeError('there is nothing to ask about: put a video or an image before the question, as in: '
                        f'keye ask video.mp4 "{question[:60]}"')  # fmt: skip
    return files, question


def check_evidence(path: Path, media: Sequence[Medium], overwrite: bool) -> None:
    """`KeyeError` where `--evidence` cannot work, before a model is loaded."""
    outputs.check_suffix(path, "--evidence", (*outputs.PICTURE_FORMATS, ".json"))
    outputs.check_not_input(path, "--evidence", [medium.source for medium in media])
    is_own = partial(is_json_with, names=_NAMES) if path.suffix.lower() == ".json" else has_mark
    check_output(path, is_own, overwrite=overwrite)


def write_evidence(model: Keye, media: Sequence[Medium], question: str, answer: Answer, path: Path) -> None:
    """Writes the evidence of an answer; a picture shows the frames that were selected most, decoded again."""
    assert answer.evidence is not None
    if path.suffix.lower() == ".json":
        data = {"question": question, "answer": answer.text, "intervals": answer.intervals, **answer.evidence.to_dict()}
        with output_file(path) as draft:
            draft.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    from keye.sessions.pictures import THUMBNAILS, draw_evidence

    videos = [(place, medium) for place, medium in enumerate(answer.evidence.media) if medium.kind == "video"]
    thumbnails = {place: _thumbnails(model, media, place, medium.top(THUMBNAILS)) for place, medium in videos}
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
