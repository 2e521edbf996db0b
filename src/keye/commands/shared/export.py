"""`--export` and `--record`: checked before a model is loaded, written after the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.chat.messages import Medium
from keye.commands.shared.inputs import note
from keye.commands.shared.outputs import check_not_input
from keye.errors import KeyeError
from keye.exports import FORMATS, ExportOptions, ExportRange, MediaReference, check_export, export_moments, find_format
from keye.exports import render as render_export
from keye.media.content import probe_cached
from keye.media.source.fetch import Source, is_index

if TYPE_CHECKING:
    from keye.exports.write import Format


@dataclass(frozen=True)
class ExportPlan:
    """Files that will be written of moments in one video, or in those that `ExportRange.file` names."""

    files: Sequence[tuple[Path, Format]]
    options: ExportOptions
    sources: Source | Mapping[str, Source]
    track: int | None
    overwrite: bool

    def write(self, ranges: Sequence[ExportRange], title: str) -> list[Path]:
        """Writes the files and returns their paths; notes go to standard error, each once."""
        if isinstance(self.sources, Source):
            media: MediaReference | dict[str, MediaReference] = self._reference(self.sources)
        else:
            # The videos in which something was found, in the order of the moments.
            named = dict.fromkeys(item.file for item in ranges if item.file in self.sources)
            media = {file: self._reference(self.sources[file]) for file in named if file is not None}
            if not media:
                note("nothing was found, so nothing was exported")
                return []
        notes: dict[str, None] = {}
        for path, chosen in self.files:
            sentences = export_moments(ranges, media, path, format=chosen.name, options=self.options, title=title,
                                       overwrite=self.overwrite)  # fmt: skip
            notes.update(dict.fromkeys(sentences))
        for sentence in notes:
            note(sentence)
        return [path for path, _ in self.files]

    def check(self) -> None:
        """`KeyeError` where the options and formats do not go with the one video."""
        if isinstance(self.sources, Source):
            media = self._reference(self.sources)
            for _, chosen in self.files:
                render_export([], media, chosen, self.options)

    def _reference(self, source: Source) -> MediaReference:
        info = probe_cached(source, None, track=self.track)
        # A temporary file has a name of its own that says nothing.
        place = source.path if source.keep is None else None
        return MediaReference.of(info, place, None if place is not None else source.name)


def plan_exports(
    arguments: Mapping[str, Any], sources: Source | Mapping[str, Source], *, overwrite: bool
) -> ExportPlan | None:
    """What `options.exporting` asks for; None without `--export`. Raises `KeyeError` for files and settings that cannot
    be, so that no answer is lost; opens the video to check them where it is one."""
    names: Sequence[str] = arguments.get("export") or ()
    if not names:
        for option in ("export_rate", "start_timecode", "handles", "markers"):
            if arguments.get(option):
                raise KeyeError(f"--{option.replace('_', '-')} belongs to --export: name a file to export to")
        return None
    if isinstance(sources, Source) and is_index(sources):
        raise KeyeError(
            f"{sources.name} is an index without the frame rate of the video: give the video itself for --export"
        )
    options = ExportOptions(
        arguments.get("export_rate"), arguments.get("start_timecode"), arguments.get("handles") or (0.0, 0.0),
        "markers" if arguments.get("markers") else "sequence",
    )  # fmt: skip
    files = [_parse_target(name) for name in names]
    if len({path.absolute() for path, _ in files}) < len(files):
        raise KeyeError("--export names a file twice: give each export a name of its own")
    inputs = [sources] if isinstance(sources, Source) else list(sources.values())
    for path, chosen in files:
        check_not_input(path, "--export", inputs)
        check_export(path, chosen, overwrite=overwrite)
    plan = ExportPlan(files, options, sources, arguments.get("track"), overwrite)
    plan.check()
    return plan


def plan_media_exports(
    media: Sequence[Medium], arguments: Mapping[str, Any], *, overwrite: bool
) -> ExportPlan | None:  # fmt: skip
    """`plan_exports` for a question about media, of which one must be a video."""
    videos = [medium.source for medium in media if medium.kind == "video"]
    if arguments.get("export") and (len(videos) != 1 or not isinstance(videos[0], Source)):
        raise KeyeError("--export writes the moments of one video: ask about a single video, or leave --export out")
    source: Source | dict[str, Source] = videos[0] if videos and isinstance(videos[0], Source) else {}
    return plan_exports(arguments, source, overwrite=overwrite)


def _parse_target(name: str) -> tuple[Path, Format]:
    """FILE or FORMAT:FILE."""
    before, mark, rest = name.partition(":")
    if mark and rest and before in FORMATS:
        return Path(rest), FORMATS[before]
    return Path(name), find_format(Path(name))
