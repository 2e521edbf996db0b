"""`keye find`: the moments of an event in hours of video."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from keye.commands.shared import options
from keye.errors import KeyeError, MediaError

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.chat.messages import Medium
    from keye.media.source.fetch import Source
    from keye.moments import FindResult, Moment

_INTERRUPTED: Final = 130
_EFFORTS: Final = ("auto", "low", "medium", "high")


@click.command(context_settings=options.CONTEXT)
@click.argument("words", nargs=-1, metavar='VIDEOS... "EVENT"')
@click.option(
    "--top", type=click.IntRange(1, 100), default=5, show_default=True, metavar="N", help="Moments of a video at most."
)
@click.option("--threshold", type=click.FloatRange(0, 1), metavar="P",
              help="Probability from which on a moment counts as found.  [default: the model's]")  # fmt: skip
@click.option("--budget", type=options.COUNT, metavar="TOKENS",
              help="Tokens that a question may take.  [default: an eighth of those of the index]")  # fmt: skip
@click.option("--effort", type=click.Choice(_EFFORTS), default="auto", show_default=True,
              help="How densely a video is read, and how many places are looked at closely: auto goes by the rates "
                   "measured on this machine.")  # fmt: skip
@click.option("--seconds", type=options.Positive(), metavar="N", help="Stop after N seconds with the best so far.")
@click.option("--index", "index_file", type=options.PATH, metavar="FILE",
              help="Keep the search index of one video here.  [default: in the user's cache]")  # fmt: skip
@click.option("--no-scenes", is_flag=True,
              help="Do not decode every frame to find hard cuts; borders then lie on none.")  # fmt: skip
@click.option("--subtitles", metavar="FILE|TRACK|none",
              help="Subtitles to search too.  [default: those that players show]")  # fmt: skip
@options.transcribe
@click.option("--clips", type=options.PATH, metavar="DIR", help="Write each moment as a video file to this folder.")
@click.option("--library", "in_library", is_flag=True, help="Search the videos of keye library instead of named ones.")
@click.option("--library-folder", type=options.PATH, metavar="DIR",
              help="With --library: where it is kept.  [default: in the user's data folder]")  # fmt: skip
@click.option("--embedder", metavar="NAME",
              help="With --library: rank by stored vectors of this image-text embedder first.")  # fmt: skip
@options.exporting
@options.overwrite
@options.reading
@options.private_urls
@options.template
@options.storing
@options.running
@options.no_scope_notes
@options.as_json
@options.debug
def find(words: tuple[str, ...], clips: Path | None, overwrite: bool, as_json: bool, **arguments: Any) -> None:
    """Find the moments of an event in long videos.

    The last argument is the event; before it are videos, folders of videos, or search indexes that were kept with
    --index. A video is read once: later questions about it take seconds. Ctrl-C ends the search and prints the best so
    far. Exit code 0 also when nothing was found.

    \b
    keye find video.mp4 "the red circle"
    keye find day1.mp4 day2.mp4 holidays/ "a dog on the beach" --clips dogs --model 2.0
    keye find --library "a red circle"
    """
    from keye.commands.shared import inputs, show, show_find
    from keye.commands.shared.language import say

    if arguments["in_library"]:
        from keye.commands.library import find_in_library

        find_in_library(words, clips, overwrite, as_json, arguments)
        return
    if library_only := [options.flag(name) for name in ("library_folder", "embedder") if arguments[name] is not None]:
        raise KeyeError(f"{library_only[0]} belongs to a search in the library: add --library, or leave it out")
    files, event = split_words(words)
    if clips is not None and clips.exists() and not clips.is_dir():
        raise KeyeError(f"{clips} is a file: give a folder for --clips")
    inputs.silence_scope(arguments)
    opened = list(_open_videos(files, arguments))
    if arguments["index_file"] is not None and len(opened) > 1:
        raise KeyeError(f"--index keeps the index of one video, but {len(opened)} were named; leave it out")
    check_files(opened, arguments, overwrite=overwrite)
    model = inputs.load_model(arguments)
    searched = _search_all(model, opened, event, arguments, overwrite=overwrite)
    if not as_json:  # before the files, which may fail
        show_find.print_found([video.result for video in searched.videos], event, searched.failed)
    clip_paths, exports = list[Path](), list[Path]()
    try:
        clip_paths += _write_all_clips(searched, clips, overwrite) if clips is not None else []
        exports += _write_exports(model, searched, event, arguments, overwrite)
    finally:  # the result is not lost where a file cannot be written
        if as_json:
            extra = {"exports": [str(path) for path in exports]} if exports else {}
            show.print_json({**_to_dict(searched, event), "clips": [str(path) for path in clip_paths], **extra})
    for path in () if as_json else (*clip_paths, *exports):
        show.print_line(say("wrote", path=path))
    if searched.is_interrupted:
        raise click.exceptions.Exit(_INTERRUPTED)


def split_words(words: Sequence[str]) -> tuple[list[str], str]:
    """Files and event; `KeyeError` when either is missing."""
    if not words:
        raise KeyeError('give a video and an event, as in: keye find video.mp4 "the red circle"')
    *files, event = words
    if os.path.exists(event):
        raise KeyeError(f'{event} is a file: put the event after the files, as in: keye find {event} "the red circle"')
    if not files:
        example = f'keye find video.mp4 "{event[:60]}"'
        raise KeyeError(f"there is nothing to search: put a video before the event, as in: {example}")
    return files, event


@dataclass(frozen=True)
class Named:
    """A video by the name that the user gave it."""

    name: str
    medium: Medium


@dataclass(frozen=True)
class SearchedVideo:
    """A video, or the index of one, what was found in it, and where the video itself is."""

    name: str
    medium: Medium
    result: FindResult
    source: Source | None


@dataclass
class Searched:
    """What was searched, the files that could not be and why, and whether Ctrl-C ended it."""

    videos: list[SearchedVideo]
    failed: list[tuple[str, str]]
    is_interrupted: bool = False


#: A video that could be opened, or a name and why it could not.
Opened: TypeAlias = Named | tuple[str, str]


def _open_videos(files: Sequence[str], arguments: Mapping[str, Any]) -> Iterator[Opened]:
    """Every named file and every video of a named folder, opened, or its name and why it cannot be. An error where it
    is the only one."""
    from keye.commands.shared import inputs
    from keye.config.media import VIDEO_OPTIONS
    from keye.library.scan import list_videos

    names: list[str] = []
    for file in files:
        if not os.path.isdir(file):
            names.append(file)
            continue
        listing = list_videos(Path(file))
        for problem in listing.problems:
            inputs.note(problem)
        if not listing.videos:
            raise KeyeError(f"{file} is a folder without videos; name another one, or a file")
        names += map(str, listing.videos)
    choices = {**dict.fromkeys((*VIDEO_OPTIONS, *options.VIDEO_OPTIONS, *options.FORMAT_OPTIONS)), **arguments}
    names = list(dict.fromkeys(names))
    for name in names:
        try:
            yield Named(name, inputs.only_video(name, choices))
        except MediaError as error:
            if len(names) == 1:
                raise
            yield name, str(error)


def _search_all(
    model: Keye, opened: Sequence[Opened], event: str, arguments: Mapping[str, Any], *, overwrite: bool
) -> Searched:
    """Searches one video after the other; those that turn out to be unreadable are listed as failed."""
    from keye.commands.shared.show_find import watch_search
    from keye.commands.shared.subtitles import find_subtitles

    searched, several = Searched([], []), len(opened) > 1
    for item in opened:
        if isinstance(item, tuple):
            searched.failed.append(item)
            continue
        name, medium = item.name, item.medium
        stream = model.stream_find(
            medium, event, name=name if several else None, top=arguments["top"], threshold=arguments["threshold"],
            budget=arguments["budget"], effort=arguments["effort"], seconds=arguments["seconds"],
            index=arguments["index_file"], overwrite=overwrite, scenes=not arguments["no_scenes"],
            subtitles=find_subtitles(medium, arguments),
        )  # fmt: skip
        try:
            result = watch_search(stream, name)
        except KeyboardInterrupt:
            searched.is_interrupted, result = True, stream.best_so_far()
        except MediaError as error:
            if not several:
                raise
            searched.failed.append((name, str(error)))
            continue
        searched.videos.append(SearchedVideo(name, medium, result, stream.search.source))
        if searched.is_interrupted:
            break
    return searched


def _to_dict(searched: Searched, event: str) -> dict[str, Any]:
    """The result of one video, or the moments of several in one ranking beside the results of each."""
    results = [video.result for video in searched.videos]
    if len(results) == 1 and not searched.failed:
        return results[0].to_dict()
    return {
        "query": event, "found": any(result.is_found for result in results),
        "moments": [moment.to_dict() for moment in rank_over_videos(results)],
        "results": [result.to_dict() for result in results],
        "failed": [{"file": file, "error": error} for file, error in searched.failed],
    }  # fmt: skip


def rank_over_videos(results: Sequence[FindResult]) -> list[Moment]:
    """The moments of several videos in one ranking: by probability, and by rank where there is none."""
    moments = [moment for result in results for moment in result.moments]
    ordered = sorted(moments, key=lambda moment: (-(moment.probability or 0.0), moment.rank))
    return [replace(moment, rank=rank) for rank, moment in enumerate(ordered, 1)]


def check_files(opened: Sequence[Opened], arguments: Mapping[str, Any], *, overwrite: bool) -> None:
    """`KeyeError` where `--export` and `--record` cannot work, before a model is loaded."""
    from keye.commands.shared.export import plan_exports
    from keye.commands.shared.record import check_record
    from keye.media.source.fetch import is_index

    if not (arguments["export"] or arguments["record"]):
        plan_exports(arguments, {}, overwrite=overwrite)
        return
    media = {video.name: _resolve_video(video.medium.source) for video in opened if isinstance(video, Named)}
    if arguments["record"] is not None:
        if len(opened) > 1:
            raise KeyeError(f"--record writes the record of one video, but {len(opened)} were named; leave it out")
        if any(is_index(source) for source in media.values()):
            raise KeyeError("the video of the index is not where it was: give the video itself for --record")
        check_record(arguments["record"], list(media.values()), overwrite=overwrite)
    if len(opened) == 1:
        plan_exports(arguments, next(iter(media.values())), overwrite=overwrite)
    else:
        plan_exports(arguments, media, overwrite=overwrite)


def _resolve_video(source: Any) -> Any:
    """The video of a search index where it still is; anything else as it is."""
    from keye.cache.segments import is_segmented, read_segments
    from keye.sessions.search.headers import IndexContents
    from keye.sessions.search.places import find_again

    if source.path is None or not is_segmented(source.path):
        return source
    head = IndexContents.read(source.path, read_segments(source.path)).head
    return find_again(head.source.get("path"), str(head.source["identity"])) or source


def _write_exports(
    model: Keye, searched: Searched, event: str, arguments: Mapping[str, Any], overwrite: bool
) -> list[Path]:
    """Writes what `--export` and `--record` ask for."""
    from keye.commands.shared.export import plan_exports
    from keye.commands.shared.record import write_find_record
    from keye.exports import ranges_of
    from keye.sessions.search.questions import ground_question, presence_question

    paths: list[Path] = []
    sources = {video.name: video.source for video in searched.videos if video.source is not None}
    if arguments["export"] and len(sources) < len(searched.videos):
        raise KeyeError("the video of an index is not where it was: give the video itself for --export")
    several = len(searched.videos) + len(searched.failed) > 1
    if sources and arguments["export"]:
        moments = rank_over_videos([video.result for video in searched.videos])
        plan = plan_exports(arguments, sources if several else next(iter(sources.values())), overwrite=overwrite)
        paths += plan.write(ranges_of(moments, event), event) if plan is not None else []
    if arguments["record"] is not None and sources:
        config, (video,) = model.runtime.generation_config, searched.videos
        prompts = [presence_question(config, event), ground_question(config, event)]
        settings = {name: arguments[name] for name in ("effort", "budget", "top", "seconds") if arguments[name]}
        write_find_record(arguments["record"], model, sources[video.name], video.result, prompts, settings)
        paths.append(arguments["record"])
    return paths


def _write_all_clips(searched: Searched, folder: Path, overwrite: bool) -> list[Path]:
    """Cuts the moments of each video. `KeyeError` for an index whose video is gone."""
    from keye.commands.ground import write_clips
    from keye.media.clips import clip_prefixes

    paths: list[Path] = []
    prefixes = iter(clip_prefixes([video.source for video in searched.videos if video.source is not None]))
    for video in searched.videos:
        prefix = next(prefixes) if video.source is not None else ""
        intervals = tuple((moment.start, moment.end) for moment in video.result.moments)
        if intervals and video.source is None:
            raise KeyeError(f"the video of {video.result.video} is not where it was: give it itself for --clips")
        paths += write_clips(replace(video.medium, source=video.source), intervals, folder, overwrite, prefix)
    return paths
