"""`keye library`: folders of videos that are indexed once and searched together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from keye.commands.shared import options
from keye.errors import KeyeError
from keye.units import format_bytes, plural

if TYPE_CHECKING:
    from keye.library.catalog import Catalog, Entry, ScanReport
    from keye.library.find import LibraryResult

#: Seconds between two looks at watched folders.
_WATCH_SECONDS: Final = 5.0
place = click.option("--library-folder", type=options.PATH, metavar="DIR",
                     help="Where the library is kept.  [default: in the user's data folder]")  # fmt: skip
_indexing = options.combine(
    click.option("--limit", type=options.Bytes(), metavar="SIZE",
                 help="Disk that all indexes together may take, as 50GiB."),
    place,
    click.option("--effort", type=click.Choice(["auto", "low", "medium", "high"]), default="auto", show_default=True,
                 help="How densely videos are looked at: auto goes by the rates measured on this machine."),
    click.option("--embedder", metavar="NAME",
                 help="Also store vectors of this image-text embedder of an installed package."),
    options.running,
    options.debug,
)  # fmt: skip


@click.group(context_settings=options.CONTEXT)
def library() -> None:
    """Keep folders of videos indexed, and search all of them with keye find --library.

    Videos are read where they are; nothing is written beside them.

    \b
    keye library add ~/Videos
    keye library list
    keye find --library "a red circle"
    """


@library.command(context_settings=options.CONTEXT)
@click.argument("folder", type=options.PATH)
@click.option("--watch", is_flag=True, help="Stay, and index new videos as they appear, until Ctrl-C.")
@click.option("--no-index", is_flag=True, help="Only note the folder; keye library index does the work later.")
@_indexing
def add(folder: Path, watch: bool, no_index: bool, **arguments: Any) -> None:
    """Add a folder, and index its videos.

    May be stopped at any time: the next run goes on where it was.
    """
    catalog = _open_for_indexing(arguments)
    _print_scan(catalog.add_folder(folder, watch=watch))
    if not no_index:
        _index(catalog, watch, arguments)


@library.command(context_settings=options.CONTEXT)
@click.option("--watch", is_flag=True, help="Stay, and index new videos of watched folders as they appear.")
@click.option("--retry-failed", is_flag=True, help="Try videos again that could not be read.")
@_indexing
def index(watch: bool, retry_failed: bool, **arguments: Any) -> None:
    """Look for new and changed videos, and index what is left."""
    catalog = _open_for_indexing(arguments)
    if retry_failed:
        catalog.retry_failed()
    _print_scan(catalog.scan())
    _index(catalog, watch, arguments)


@library.command("list", context_settings=options.CONTEXT)
@place
@options.as_json
@options.debug
def list_(library_folder: Path | None, as_json: bool) -> None:
    """List folders and videos: discovered, indexing, indexed, or failed."""
    from keye.commands.shared import inputs, show

    catalog = open_catalog(library_folder)
    for problem in catalog.scan().problems:
        inputs.note(problem)
    entries = catalog.entries()
    if as_json:
        folders = [{"path": str(folder.path), "watch": folder.watch} for folder in catalog.folders()]
        show.print_json({
            "library": str(catalog.folder), "folders": folders, "videos": [entry.to_dict() for entry in entries],
            "bytes": catalog.used_bytes(), "limit": catalog.limit,
        })  # fmt: skip
        return
    for folder in catalog.folders():
        show.print_line(f"{folder.path}{' (watched)' if folder.watch else ''}")
        for entry in entries:
            if entry.path.is_relative_to(folder.path):
                show.print_line(f"  {entry.path.relative_to(folder.path)}: {describe(entry)}")
    show.print_line(f"{plural(len(entries), 'video')}, indexes of {format_bytes(catalog.used_bytes())} "
                    f"of at most {format_bytes(catalog.limit)}")  # fmt: skip


@library.command(context_settings=options.CONTEXT)
@click.argument("folder", type=options.PATH)
@place
@options.debug
def remove(folder: Path, library_folder: Path | None) -> None:
    """Forget a folder and delete its indexes; the videos stay."""
    from keye.commands.shared import show

    freed = open_catalog(library_folder).remove_folder(folder)
    show.print_line(f"removed {folder}: {format_bytes(freed)} of indexes deleted, the videos are untouched")


def open_catalog(folder: Path | None) -> Catalog:
    """The library in `folder`, or that of the user."""
    from keye.config.environment import library_folder
    from keye.library.catalog import Catalog

    return Catalog(folder if folder is not None else library_folder())


def _open_for_indexing(arguments: dict[str, Any]) -> Catalog:
    """The library, with the limit that was set for it."""
    catalog = open_catalog(arguments["library_folder"])
    if arguments["limit"] is not None:
        catalog.limit = arguments["limit"]
    return catalog


def describe(entry: Entry) -> str:
    """State of a video in words."""
    if entry.state == "indexed":
        return f"indexed, {format_bytes(entry.bytes)}"
    if entry.state == "failed":
        return f"failed: {entry.reason}"
    until = f", searchable up to {_clock(entry.searchable)}" if entry.searchable else ""
    return f"{entry.state}{until}" + (f" ({entry.reason})" if entry.reason else "")


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def _print_scan(report: ScanReport) -> None:
    from keye.commands.shared import inputs, show

    for problem in report.problems:
        inputs.note(problem)
    show.print_line(f"{plural(report.added, 'new video')}, {report.changed:,} changed, {report.removed:,} gone")


def _index(catalog: Catalog, watch: bool, arguments: dict[str, Any]) -> None:
    from keye.commands.shared import inputs
    from keye.library.catalog import SETTLED

    if not watch:
        if recent := catalog.count_unsettled():
            inputs.note(f"{plural(recent, 'file')} changed a moment ago: waiting until they are complete")
            time.sleep(SETTLED)
            catalog.scan()
        if not catalog.entries("discovered", "indexing"):
            return
    model = inputs.load_model(arguments)
    run_indexing(model, catalog, arguments)
    while watch:
        time.sleep(_WATCH_SECONDS)
        catalog.scan()
        if catalog.entries("discovered"):
            run_indexing(model, catalog, arguments)


def run_indexing(model: Any, catalog: Catalog, arguments: dict[str, Any]) -> None:
    """Indexes what is left, and prints each video that is done or failed."""
    from keye.commands.shared import inputs, show
    from keye.library.indexing import index_library
    from keye.sessions.search.embedders import load_embedder

    embedder = load_embedder(arguments["embedder"]) if arguments["embedder"] else None
    before, begun = catalog.last_change(), time.monotonic()
    with show.progress_bar("indexing", notes=True) as advance:
        for event in index_library(model, catalog, effort=arguments["effort"], embedder=embedder):
            if event.progress is not None:
                advance(round(event.progress.done), round(event.progress.total))
            for entry in catalog.entries("indexed", "failed", since=before):
                inputs.note(f"{entry.path.name}: {describe(entry)}")
            before = catalog.last_change()
    for entry in catalog.entries("indexed", "failed", since=before):
        inputs.note(f"{entry.path.name}: {describe(entry)}")
    show.print_line(f"{plural(len(catalog.entries('indexed')), 'video')} indexed, "
                    f"{len(catalog.entries('failed')):,} failed, {time.monotonic() - begun:.0f} s")  # fmt: skip


def find_in_library(
    words: tuple[str, ...], clips: Path | None, overwrite: bool, as_json: bool, arguments: dict[str, Any]
) -> None:
    """What `keye find --library` does: searches, prints, cuts clips. Ctrl-C ends it with the best so far."""
    from dataclasses import replace

    from keye.commands.shared import inputs, show, show_find
    from keye.commands.shared.export import plan_exports
    from keye.commands.shared.language import say
    from keye.exports import ranges_of
    from keye.library.find import LibrarySearch
    from keye.media.source.fetch import fetch_source
    from keye.sessions.search.embedders import load_embedder

    if len(words) != 1:
        raise KeyeError('--library searches its own videos: give only the event, as in: keye find --library "a dog"')
    for name in ("index_file", "subtitles", "transcribe"):
        if arguments[name] is not None:
            raise KeyeError(f"{options.flag(name.removesuffix('_file'))} belongs to a named video: leave it out "
                            "with --library")  # fmt: skip
    if arguments["record"] is not None:
        raise KeyeError("--record belongs to named videos: leave it out with --library")
    exports = plan_exports(arguments, {}, overwrite=overwrite)
    catalog = open_catalog(arguments["library_folder"])
    inputs.silence_scope(arguments)
    search = LibrarySearch(
        inputs.load_model(arguments), catalog, words[0], top=arguments["top"], threshold=arguments["threshold"],
        budget=arguments["budget"], seconds=arguments["seconds"],
        embedder=load_embedder(arguments["embedder"]) if arguments["embedder"] else None,
    )  # fmt: skip
    result = show_find.watch_library_search(search)
    if not as_json:  # before the files, which may fail
        show_find.print_library_found(result)
    paths, files = list[Path](), list[Path]()
    try:
        paths += _write_clips(result, clips, overwrite) if clips is not None else []
        if exports is not None:
            sources = {moment.file: fetch_source(moment.file) for moment in result.moments if moment.file}
            files += replace(exports, sources=sources).write(ranges_of(result.moments, words[0]), words[0])
    finally:  # the result is not lost where a file cannot be written
        if as_json:
            named = {"exports": [str(path) for path in files]} if files else {}
            show.print_json({**result.to_dict(), "clips": [str(path) for path in paths], **named})
    for path in () if as_json else [*paths, *files]:
        show.print_line(say("wrote", path=path))
    if result.stopped and arguments["seconds"] is None and arguments["budget"] is None:
        raise click.exceptions.Exit(130)


def _write_clips(result: LibraryResult, folder: Path, overwrite: bool) -> list[Path]:
    """A clip of each moment, by video."""
    from keye.commands.ground import write_clips
    from keye.engine.media import as_medium
    from keye.media.clips import clip_prefixes
    from keye.media.source.fetch import fetch_source

    files = list(dict.fromkeys(moment.file for moment in result.moments if moment.file))
    paths: list[Path] = []
    for file, prefix in zip(files, clip_prefixes([fetch_source(file) for file in files]), strict=True):
        intervals = tuple((moment.start, moment.end) for moment in result.moments if moment.file == file)
        paths += write_clips(as_medium(file, None), intervals, folder, overwrite, prefix)
    return paths
