"""Subtitles as lines of text with their times: from SRT and WebVTT files, from text tracks inside a video, and from
files beside it. Files are parsed here, by code whose time grows with the bytes only; tracks in the decode worker's
confinement (`keye.media.decode.subtitle_worker`). Knows nothing of models."""

from __future__ import annotations

import codecs
import glob
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from keye.errors import KeyeError, MediaError
from keye.media.decode.wire import FRAME, INFO
from keye.media.decode.workers import UNTRUSTED_LIMITS, DecodeLimits, Worker
from keye.media.source.fetch import Reference, Source, fetch_source
from keye.moments import SubtitleLine
from keye.units import MIB, format_bytes, plural

#: Largest subtitle file, in bytes; most lines of a track; most characters of one line.
MOST_BYTES: Final = 8 * MIB
MOST_LINES: Final = 100_000
MOST_CHARACTERS: Final = 1000
#: Most tracks of a video, and most files beside it, that are listed.
MOST_TRACKS: Final = 64
#: Endings of files that are looked for beside a video.
SUFFIXES: Final = (".srt", ".vtt")

_MOST_MESSAGE: Final = 64 * MIB
_ARROW: Final = "-->"
_TIME: Final = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,9}))?"
_TIMES: Final = re.compile(rf"\s{{0,20}}{_TIME}\s{{0,20}}-->\s{{0,20}}{_TIME}(?:\s.*)?$")
_TAG: Final = re.compile(r"</?[A-Za-z0-9:.][^<>]{0,300}>|<>|\{\\[^{}]{0,300}\}|\{[yYfFsScC]:[^{}]{0,100}\}")
_BLOCKS: Final = ("NOTE", "STYLE", "REGION")
#: Language and marks in the name of a file beside a video, as in `talk.en.srt` or `talk.zh-Hans.forced.vtt`.
_NAME_TAG: Final = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})?(?=\.|$)")
_LANGUAGE: Final = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8}){0,2}")
#: Joiners that scripts need and that are not printable by themselves.
_JOINERS: Final = "\u200c\u200d"

Origin = Literal["file", "track", "speech"]


@dataclass(frozen=True)
class SubtitleTrack:
    """Where lines come from: a "file", a "track" inside the video, or "speech" that was transcribed. `id` names it in
    requests: the number of a track ("1", "2", ...) or the name of a file. `language` is a tag such as "en", None where
    it is not known."""

    id: str
    origin: Origin
    name: str
    language: str | None = None
    is_default: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Subtitles:
    """The lines of one track, by their begin, on the clock of the file in seconds. `notes` are sentences on what was
    left out."""

    track: SubtitleTrack
    lines: tuple[SubtitleLine, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "track": self.track.to_dict(), "lines": [asdict(line) for line in self.lines], "notes": list(self.notes),
        }  # fmt: skip


def parse_subtitles(data: bytes, name: str = "the subtitles") -> Subtitles:
    """The lines of an SRT or WebVTT file.

    Text is UTF-8 or UTF-16 with a byte order mark, UTF-8 without, or else taken for Western European. Markup is
    removed. Blocks that are malformed are left out and counted in a note. Raises `MediaError` for a file that is larger
    than `MOST_BYTES` or holds no line.
    """
    if len(data) > MOST_BYTES:
        raise MediaError(
            f"{name} has {format_bytes(len(data))}, more than the limit of {format_bytes(MOST_BYTES)} for subtitles"
        )
    text, notes = _decode(data)
    lines, faults, beyond = list[SubtitleLine](), 0, 0
    for block in _blocks(text.splitlines()):
        line = None if block is None else make_line(*block)
        if line is None:
            faults += 1
        elif len(lines) == MOST_LINES:
            beyond += 1
        elif line.text:
            lines.append(line)
    if not lines:
        raise MediaError(f"{name} holds no subtitle that can be read; give an SRT or WebVTT file")
    if faults:
        notes.append(f"{plural(faults, 'block')} of {name} could not be read: left out")
    if beyond:
        notes.append(f"only the first {MOST_LINES:,} lines of {name} were read")
    track = SubtitleTrack(name, "file", name, _language_of(name))
    return Subtitles(track, tuple(sorted(lines, key=lambda line: (line.start, line.end))), tuple(notes))


def make_line(start: float, end: float, text: str) -> SubtitleLine | None:
    """A line with its text on one row, without markup and cut at `MOST_CHARACTERS`; None for times that are none."""
    if not (0 <= start < end < math.inf):
        return None
    return SubtitleLine(round(start, 3), round(end, 3), strip_markup(text[: 8 * MOST_CHARACTERS])[:MOST_CHARACTERS])


def strip_markup(text: str) -> str:
    """Plain text on one row: without tags, with entities and white space resolved, without control characters."""
    plain = html.unescape(_TAG.sub("", text)) if any(mark in text for mark in "<{&") else text
    printable = "".join(c if c.isprintable() or c in _JOINERS else " " for c in plain)
    return " ".join(printable.split())


def find_sidecars(video: Path) -> list[Path]:
    """Subtitle files beside a video: those of its name, then those with a language between name and ending."""
    stem = glob.escape(str(video.with_suffix("")))
    candidates = (Path(path) for path in sorted(glob.iglob(f"{stem}.*")))
    files = [path for path in candidates if path.suffix.lower() in SUFFIXES and path.is_file()]
    matching = [path for path in files if path.stem == video.stem or _NAME_TAG.match(path.stem[len(video.stem) + 1 :])]
    return sorted(matching, key=lambda path: (path.stem != video.stem, path.name))[:MOST_TRACKS]


def read_subtitle_file(path: Path) -> Subtitles:
    """The lines of a subtitle file. Raises `MediaError` where it cannot be read."""
    source = fetch_source(path, max_bytes=MOST_BYTES)
    with source.open() as file:
        return parse_subtitles(file.read(MOST_BYTES + 1), source.name)


def list_tracks(video: Reference) -> list[SubtitleTrack]:
    """The text tracks of a video and, of a local file that is trusted, the subtitle files beside it, these first.
    Blocks."""
    source = fetch_source(video)
    with closing(_TrackReader(source)) as reader:
        return [*_sidecar_tracks(source), *reader.tracks]


def load_subtitles(video: Reference, choice: str | Path | None = None) -> Subtitles | None:
    """The subtitles of a video as the local user names them: a subtitle file, or what `load_track` takes; None for
    "none". Blocks."""
    if choice == "none":
        return None
    if isinstance(choice, Path) or (choice is not None and not _names_track(choice)):
        return read_subtitle_file(Path(choice))
    return load_track(video, choice)


def load_track(video: Reference, track: str | None = None) -> Subtitles | None:
    """The lines of one of `list_tracks`; None where there is none.

    `track` is its id or a language such as "en", None for what players would show: a file beside the video, then the
    default track. Raises `KeyeError` where it is not there. A track inside the video takes reading the whole file.
    Blocks.
    """
    source = fetch_source(video)
    files = _sidecar_tracks(source)
    with closing(_TrackReader(source)) as reader:
        chosen = _choose([*files, *reader.tracks], track, source.name)
        if chosen is None:
            return None
        if chosen not in files:
            return reader.read(chosen)
    assert source.path is not None
    return replace(read_subtitle_file(source.path.parent / chosen.id), track=chosen)


def _names_track(choice: str) -> bool:
    return choice.isdecimal() or _LANGUAGE.fullmatch(choice) is not None


def _choose(tracks: Sequence[SubtitleTrack], wanted: str | None, name: str) -> SubtitleTrack | None:
    if wanted is None:
        return next((track for track in tracks if track.is_default or track.origin == "file"), next(iter(tracks), None))
    by_language = (track for track in tracks if track.language and _same_language(track.language, wanted))
    chosen = next((track for track in tracks if track.id == wanted), next(by_language, None))
    if chosen is None:
        listed = ", ".join(f"{track.id}: {track.name}" for track in tracks[:8]) or "none"
        raise KeyeError(f"{name} has no subtitles {wanted[:40]!r}; there are: {listed}")
    return chosen


def _same_language(language: str, wanted: str) -> bool:
    ours, theirs = language.lower(), (_tag_of(wanted) or "").lower()
    return ours == theirs or ours.split("-")[0] == theirs


def _tag_of(language: object) -> str | None:
    """A language as a short tag, "en" for "eng"; None where it is not known."""
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language) or language in ("und", "mis", "mul", "zxx"):
        return None
    return _TWO_LETTERS.get(language.lower(), language)


#: Languages that containers write with three letters.
_TWO_LETTERS: Final = {
    "ara": "ar", "chi": "zh", "zho": "zh", "cze": "cs", "ces": "cs", "dan": "da", "dut": "nl", "nld": "nl", "eng": "en",
    "fin": "fi", "fre": "fr", "fra": "fr", "ger": "de", "deu": "de", "gre": "el", "ell": "el", "heb": "he", "hin": "hi",
    "hun": "hu", "ind": "id", "ita": "it", "jpn": "ja", "kor": "ko", "nor": "no", "per": "fa", "fas": "fa", "pol": "pl",
    "por": "pt", "rum": "ro", "ron": "ro", "rus": "ru", "spa": "es", "swe": "sv", "tha": "th", "tur": "tr", "ukr": "uk",
    "vie": "vi",
}  # fmt: skip


def _sidecar_tracks(source: Source) -> list[SubtitleTrack]:
    if source.path is None or source.untrusted or source.keep is not None:
        return []
    return [SubtitleTrack(path.name, "file", path.name, _language_of(path.name)) for path in find_sidecars(source.path)]


def _language_of(name: str) -> str | None:
    """The language that the name of a file tells, as in `talk.en.srt`."""
    parts = name.split(".")[1:-1]
    return next((_tag_of(part.replace("_", "-")) for part in parts if _NAME_TAG.fullmatch(part)), None)


def _decode(data: bytes) -> tuple[str, list[str]]:
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                           (codecs.BOM_UTF16_BE, "utf-16-be")):  # fmt: skip
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace"), []
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        return text, ["the text is not UTF-8 and was taken for Western European; save it as UTF-8 if letters are wrong"]


def _blocks(rows: Sequence[str]) -> Iterator[tuple[float, float, str] | None]:
    """(start, end, text) of each block; None for one whose times cannot be read. A block ends at an empty row, or where
    the number and the times of the next one come without any."""
    place, count = 0, len(rows)
    while place < count:
        row = rows[place]
        if row.startswith(_BLOCKS) and _ARROW not in row:
            while place < count and rows[place].strip():
                place += 1
            continue
        place += 1
        if _ARROW not in row:
            continue
        match = _TIMES.match(row[:200])
        texts: list[str] = []
        while place < count and rows[place].strip() and _ARROW not in rows[place]:
            is_number = rows[place].strip().isdecimal() and place + 1 < count and _ARROW in rows[place + 1]
            if is_number:
                break
            texts.append(rows[place])
            place += 1
        if match is None:
            yield None
            continue
        groups = match.groups()
        yield _seconds(groups[:4]), _seconds(groups[4:]), "\n".join(texts)


def _seconds(groups: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = groups
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0) + float(f"0.{fraction or 0}")


class _TrackReader:
    """The text tracks of a video file, read by a confined worker."""

    def __init__(self, source: Source, limits: DecodeLimits | None = None) -> None:
        limits = limits or (UNTRUSTED_LIMITS if source.untrusted else DecodeLimits())
        options = {"common_only": source.untrusted, "most_lines": MOST_LINES, "most_tracks": MOST_TRACKS,
                   "most_characters": 8 * MOST_CHARACTERS}  # fmt: skip
        with source.open_file() as file:
            self._worker = Worker("keye.media.decode.subtitle_worker", file, options, limits, name=source.name,
                                  what="subtitle reader", untrusted=source.untrusted)  # fmt: skip
        try:
            self.tracks = list(self._read_tracks())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._worker.close()

    def _read_tracks(self) -> Iterator[SubtitleTrack]:
        for entry in self._receive(INFO, 1 << 18)[:MOST_TRACKS]:
            try:
                number, language, title, is_default = entry
                name = strip_markup(str(title))[:80] or f"track {int(number)}"
                yield SubtitleTrack(str(int(number)), "track", name, _tag_of(language), bool(is_default))
            except (ValueError, TypeError):
                raise self._worker.broken() from None

    def read(self, track: SubtitleTrack) -> Subtitles:
        """The lines of a track."""
        self._worker.request({"track": int(track.id)})
        entries = self._receive(FRAME, _MOST_MESSAGE)
        try:
            lines = [make_line(float(start), float(end), str(text)) for start, end, text in entries[:MOST_LINES]]
        except (ValueError, TypeError):
            raise self._worker.broken() from None
        readable = [line for line in lines if line is not None and line.text]
        empty = len(lines) - len(readable)
        notes = (f"{empty:,} lines of the track have no time or no text and were left out",) if empty else ()
        return Subtitles(track, tuple(sorted(readable, key=lambda line: (line.start, line.end))), notes)

    def _receive(self, kind: bytes, most: int) -> list[Any]:
        received, body = self._worker.receive(most)
        try:
            entries = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise self._worker.broken() from None
        if received != kind or not isinstance(entries, list):
            raise self._worker.broken()
        return entries


def to_lines(lines: Iterable[SubtitleLine | Sequence[Any]]) -> tuple[SubtitleLine, ...]:
    """Lines that a program gives: `SubtitleLine`s or (start, end, text). Raises `KeyeError` for anything else."""
    result = []
    for entry in lines:
        try:
            line = entry if isinstance(entry, SubtitleLine) else make_line(float(entry[0]), float(entry[1]), entry[2])
        except (TypeError, ValueError, IndexError):
            line = None
        if line is None:
            raise KeyeError(f"subtitles: {str(entry)[:80]!r} is not a line; give (start, end, text) in seconds")
        result.append(line)
    return tuple(result)


def read_text(text: str, name: str = "the subtitles") -> Subtitles:
    """The lines of the text of an SRT or WebVTT file, as a request holds it."""
    return parse_subtitles(text.encode("utf-8", "replace"), name)
