"""`keye ask`: a question about videos and images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options, outputs
from keye.errors import KeyeError

if TYPE_CHECKING:
    from keye.chat.messages import Medium
    from keye.chat.replies import Region


@click.command(context_settings=options.CONTEXT)
@click.argument("words", nargs=-1, metavar='FILES... "QUESTION"')
@click.option("--draw", type=options.PATH, metavar="FILE",
              help="Write the picture with the places that the answer marks (.png, .jpg, .webp).")  # fmt: skip
@click.option("--evidence", type=options.PATH, metavar="FILE",
              help="Write which frames the answer rests on: a picture (.png, .jpg, .webp) or .json.")  # fmt: skip
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
@options.as_json
@options.debug
def ask(
    words: tuple[str, ...],
    draw: Path | None,
    evidence: Path | None,
    estimate: bool,
    choices: int | None,
    logprobs: int | None,
    deterministic: bool,
    overwrite: bool,
    tools: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Answer a question about videos and images.

    The last argument is the question; the files before it are videos, images, or an index of a video that keye index
    wrote. The answer is printed as it is generated, then the time intervals in it on a timeline, then what it cost.

    \b
    keye ask video.mp4 "when is the red circle visible?"
    keye ask before.png after.png "what is different?"
    keye ask talk.mp4 "what is on the board?" --start 12:30 --end 14:00 --fps 1
    keye ask lecture.mp4 "when is the second proof?" --evidence proof.png
    keye ask street.jpg "where are the signs, and what do they say?" --model 1.5 --draw signs.png
    """
    files, question = split_words(words)
    if logprobs is not None and not as_json:
        raise KeyeError("--logprobs gives numbers for programs: add --json")
    from keye.commands.shared import inputs, show
    from keye.commands.shared.show import watching

    media = inputs.open_media(files, arguments)
    offered = inputs.read_tools(tools) if tools is not None else ()
    if draw is not None:
        check_drawing(draw, media, overwrite)
    if evidence is not None:
        from keye.commands.evidence import check_evidence, write_evidence

        check_evidence(evidence, media, overwrite)
    prediction = _predict(media, {**arguments, "as_json": as_json}) if estimate else None
    model = inputs.load_model(arguments)
    settings = {
        **inputs.reply_options(model, arguments), "n": choices or 1, "logprobs": logprobs,
        "deterministic": deterministic,
    }  # fmt: skip
    temperature = model.runtime.sampling_params(temperature=settings.get("temperature")).temperature
    if settings["n"] > 1 and temperature == 0:
        raise KeyeError(f"--n {choices} generates the same reply each time at temperature 0: add --temperature 1")
    with watching("watching") as on_progress:
        stream = model.stream_ask(
            media, question, tools=offered, evidence=evidence is not None, on_progress=on_progress, **settings
        )
        first = "" if as_json else next(stream, "")
        answer = stream.finish() if as_json else None
    answer = answer or show.print_stream(stream, first)
    is_drawn = write_picture(media, answer.regions, draw) if draw is not None else False
    if evidence is not None:
        write_evidence(model, media, question, answer, evidence)
    extra: dict[str, Any] = {"drawn": str(draw) if is_drawn else None} if draw else {}
    if prediction is not None:
        from keye.planning.question import errors_of

        extra["estimate"] = {
            **prediction,
            "errors": errors_of(prediction, answer.seconds, answer.usage.completion_tokens),
        }
    if as_json:
        show.print_json({**answer.to_dict(), **extra})
        return
    show.print_answer(answer, model)
    if answer.evidence is not None:
        show.print_evidence(answer.evidence)
    if prediction is not None:
        show.print_errors(extra["estimate"]["errors"])
    for path in ([draw] if is_drawn else []) + ([evidence] if evidence is not None else []):
        show.print_line(f"wrote {path}")


def _predict(media: Sequence[Medium], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction, which is also printed unless as JSON."""
    from keye.commands.shared import inputs, show
    from keye.media.source.fetch import Source, is_index
    from keye.planning.question import predict_question

    for medium in media:
        if isinstance(medium.source, Source) and is_index(medium.source):
            raise KeyeError(f"{medium.source.name} is an index, computed already: leave --estimate out")
    prediction = predict_question(media, inputs.find_model(arguments["model"], weights=False), arguments)
    if not arguments.get("as_json"):
        show.print_prediction(prediction)
    return prediction


def check_drawing(path: Path, media: Sequence[Medium], overwrite: bool) -> None:
    """`KeyeError` where `--draw` cannot work, before a model is loaded."""
    outputs.check_suffix(path, "--draw", outputs.PICTURE_FORMATS)
    outputs.check_not_input(path, "--draw", [medium.source for medium in media])
    from keye.files import check_output, has_mark

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
