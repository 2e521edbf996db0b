"""Which files of a folder are videos, by their names; whether they can be read is found out when they are indexed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Listing:
    """The video files of a folder with their status, sentences on what was left out, and the folders in which there may
    be more: those that could not be read."""

    videos: Mapping[Path, os.stat_result]
    problems: tuple[str, ...]
    unread: tuple[Path, ...]


def list_videos(root: Path) -> Listing:
    """The regular video files below `root`, by path. Hidden files and folders are left out and links are not
    followed."""
    videos: dict[Path, os.stat_result] = {}
    problems: list[str] = []
    unread: list[Path] = []
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
                        if not _is_text(item.name):
                            problems.append(f"{item.name!a} is left out: its name is not valid UTF-8")
                        elif stat.S_ISREG(status.st_mode):
                            videos[Path(item.path)] = status
                    if seen > MOST_FILES:
                        problems.append(f"{root} holds more than {MOST_FILES:,} files: the others are left out")
                        return Listing(videos, tuple(problems), (root,))
        except OSError as error:
            problems.append(f"{folder} cannot be read ({error.strerror})")
            unread.append(folder)
    return Listing(dict(sorted(videos.items())), tuple(problems), tuple(unread))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
