"""Which files of a folder are videos, by their names; whether they can be read is found out when they are indexed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

#: Suffixes of files that a library indexes.
SUFFIXES: Final = frozenset(
    ".3g2 .3gp .asf .avi .divx .f4v .flv .m2t .m2ts .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf "
    ".ogm .ogv .qt .ts .vob .webm .wmv".split()
)
#: More files than this in one folder of a library are a mistake, such as adding `/`.
MOST_FILES: Final = 200_000
_MOST_DEPTH: Final = 32


def list_videos(root: Path) -> tuple[dict[Path, os.stat_result], tuple[str, ...]]:
    """The regular video files below `root` with their status, by path, and a sentence for each folder that could not be
    read. Hidden files and folders are left out and links are not followed."""
    videos: dict[Path, os.stat_result] = {}
    problems: list[str] = []
    waiting = [(root, 0)]
    seen = 0
    while waiting:
        folder, depth = waiting.pop()
        try:
            with os.scandir(folder) as items:
                for item in items:
                    seen += 1
                    if item.name.startswith("."):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        if depth < _MOST_DEPTH:
                            waiting.append((Path(item.path), depth + 1))
                    elif Path(item.name).suffix.lower() in SUFFIXES:
                        status = item.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            videos[Path(item.path)] = status
                    if seen > MOST_FILES:
                        return videos, (
                            *problems,
                            f"{root} holds more than {MOST_FILES:,} files: the others are left out",
                        )
        except OSError as error:
            problems.append(f"{folder} cannot be read ({error.strerror})")
    return dict(sorted(videos.items())), tuple(problems)
