"""The formats by name and file suffix, and what writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, closest
from keye.exports.edl import to_edl
from keye.exports.fcp7 import to_fcp7
from keye.exports.fcpxml import to_fcpxml
from keye.exports.otio import to_otio
from keye.exports.ranges import Cut, ExportOptions, ExportRange, MediaReference, lay_out
from keye.exports.text import COLUMNS, chapter_notes, to_chapters, to_csv, to_ffmetadata, to_json, to_srt, to_vtt
from keye.files import MARK, check_output, has_mark, is_json_with, output_file

#: Most moments of an export.
MOST_RANGES = 100_000
_NAMES = frozenset({"keye", "title", "rate", "media", "moments"})


@dataclass(frozen=True)
class Format:
    """A format: its `name`, the file `suffix` that stands for it, its media type, and who reads it. `is_own` tells
    whether a file is an earlier export of ours; some formats have no place to say so."""

    name: str
    suffix: str
    media_type: str
    program: str
    write: Callable[[Cut], str]
    is_own: Callable[[Path], bool] = has_mark


def _is_own_table(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).decode("utf-8-sig", errors="replace").startswith(",".join(COLUMNS))


def _is_never_own(path: Path) -> bool:
    return False


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format("fcp7", ".xml", "application/xml", "Premiere", to_fcp7),
        Format("fcpxml", ".fcpxml", "application/xml", "Final Cut", to_fcpxml),
        Format("edl", ".edl", "text/plain", "DaVinci Resolve, Avid", to_edl),
        Format("otio", ".otio", "application/json", "OpenTimelineIO", to_otio),
        Format("csv", ".csv", "text/csv", "Table", to_csv, _is_own_table),
        Format("srt", ".srt", "application/x-subrip", "Subtitles", to_srt, _is_never_own),
        Format("vtt", ".vtt", "text/vtt", "Subtitles of web pages", to_vtt),
        Format("chapters", ".txt", "text/plain", "YouTube", to_chapters, _is_never_own),
        Format("ffmetadata", ".ffmetadata", "text/plain", "ffmpeg", to_ffmetadata),
        Format("json", ".json", "application/json", "Data", to_json, partial(is_json_with, names=_NAMES)),
    )
}


@dataclass(frozen=True)
class Export:
    """A file as it will be written, and sentences on how it came about, the rounding first."""

    format: Format
    data: bytes
    notes: tuple[str, ...]
    rounding_ms: int


def find_format(name: str | Path) -> Format:
    """The format that a name ("edl") or the suffix of a file stands for. `KeyeError` for others."""
    if isinstance(name, Path):
        matching = [entry for entry in FORMATS.values() if entry.suffix == name.suffix.lower()]
        if not matching:
            suffixes = ", ".join(entry.suffix for entry in FORMATS.values())
            raise KeyeError(f"{name} is not a file name that can be exported to: end it in {suffixes}")
        return matching[0]
    if name in FORMATS:
        return FORMATS[name]
    near = closest(name, FORMATS)
    raise KeyeError(f"{name!r} is not a format of exports" + (f"; did you mean {near}?" if near else
                    f": give one of {', '.join(FORMATS)}"))  # fmt: skip


def check_export(path: Path, format: Format, *, overwrite: bool = False) -> None:
    """`KeyeError` where an export could not be written, or would replace a file that is none of ours. Of subtitles and
    lists of chapters, which cannot tell who wrote them, every file is replaced only with `overwrite`."""
    check_output(path, format.is_own, overwrite=overwrite)


def render(
    ranges: Sequence[ExportRange], media: MediaReference | Mapping[str, MediaReference], format: str | Format,
    options: ExportOptions | None = None, *, title: str = "",
) -> Export:  # fmt: skip
    """The bytes of an export. `media` is the video, or the videos that `ExportRange.file` names; `title` that of the
    sequence, by default the first label. `KeyeError` with one sentence where the format cannot hold the ranges."""
    chosen = find_format(format) if isinstance(format, str) else format
    if len(ranges) > MOST_RANGES:
        raise KeyeError(f"{len(ranges):,} moments are more than the {MOST_RANGES:,} that are exported at once")
    options = options or ExportOptions()
    cut = lay_out(ranges, media, options, title or next((item.label for item in ranges if item.label), MARK))
    notes: list[str] = list(cut.notes)
    if chosen.name == "chapters":
        notes += chapter_notes(cut)
    if chosen.name == "edl":
        notes.append(f"an EDL does not tell its frame rate: open it at {cut.rate}")
    return Export(chosen, chosen.write(cut).encode("utf-8", errors="replace"), tuple(notes), cut.rounding_ms)


def export_moments(
    ranges: Sequence[ExportRange], media: MediaReference | Mapping[str, MediaReference], path: str | Path, *,
    format: str | None = None, options: ExportOptions | None = None, title: str = "", overwrite: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Writes an export in the format of the file's suffix, or in another one, and returns the notes of `Export`.

    info = keye.media.video.probe("talk.mp4")
    media = MediaReference.of(info, Path("talk.mp4"))
    export_moments(ranges_of(result.moments, result.query), media, "talk.edl")
    """
    path = Path(path)
    chosen = find_format(format or path)
    check_export(path, chosen, overwrite=overwrite)
    export = render(ranges, media, chosen, options, title=title)
    with output_file(path) as draft:
        draft.write_bytes(export.data)
    return export.notes


def describe_formats() -> list[dict[str, Any]]:
    """The formats as plain data, in the order in which a list offers them: `name`, `suffix`, `program`."""
    return [{"name": entry.name, "suffix": entry.suffix, "program": entry.program} for entry in FORMATS.values()]
