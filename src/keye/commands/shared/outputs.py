"""Files that commands write for the user: their names are checked before a model is loaded, pictures are marked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye.errors import KeyeError
from keye.files import MARK, output_file

if TYPE_CHECKING:
    from PIL import Image

#: Formats of pictures by the suffix of the file name.
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: Small files that describe the weights themselves.
_OF_WEIGHTS = ("config.json", "model.safetensors.index.json", "quantization.json")
#: The EXIF tag that names the program that wrote a picture.
_SOFTWARE = 0x0131


def check_suffix(path: Path, flag: str, suffixes: Collection[str]) -> None:
    """`KeyeError` where a file name ends in none of `suffixes`."""
    if path.suffix.lower() not in suffixes:
        raise KeyeError(f"{path} is not a file name that {flag} can write: end it in {', '.join(suffixes)}")


def check_not_input(path: Path, flag: str, sources: Iterable[object]) -> None:
    """`KeyeError` where `path` is the file of one of `sources`, under any name."""
    files = [file for source in sources if (file := getattr(source, "path", None)) is not None]
    if path.exists() and any(path.samefile(file) for file in files):
        raise KeyeError(f"{path} is the input itself: give {flag} another name, so that it is kept")


def copy_small_files(folder: Path, output: Path, fields: Mapping[str, Any]) -> None:
    """Copies what a checkpoint has beside its weights; config.json without what a quantiser wrote, with `fields`."""
    from keye.config import read_json
    from keye.config.quantization import QUANTISER_SECTIONS
    from keye.hub.download import SMALL_SUFFIXES

    for file in folder.iterdir():
        if file.suffix in SMALL_SUFFIXES and file.is_file() and file.name not in _OF_WEIGHTS:
            shutil.copyfile(file, output / file.name)
    config = {**read_json(folder / "config.json"), **fields}
    for section in QUANTISER_SECTIONS:
        config.pop(section, None)
    (output / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture in the format of its suffix, with a mark that keye wrote it."""
    exif = picture.getexif()
    exif.clear()
    exif[_SOFTWARE] = MARK
    with output_file(path) as draft:
        picture.save(draft, PICTURE_FORMATS[path.suffix.lower()], exif=exif)
