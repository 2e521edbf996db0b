"""A GGUF file as a checkpoint folder: the small files that every part of keye reads, made of the metadata.

The folder is temporary and holds no weights but a note of where they are (`gguf.link`), which `open_linked` follows.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from keye.weights.gguf.metadata import check_vision, read_config, read_files
from keye.weights.gguf.reader import GGUFError, is_gguf, read_gguf
from keye.weights.gguf.tokens import read_template, read_tokenizer, read_tokens

#: Not called .json: commands that copy a checkpoint's small files leave it out.
LINK: Final = "gguf.link"


def small_files(model: Path, mmproj: Path | None = None) -> Path:
    """The folder of a model in GGUF, made once in a process and removed at its end. `mmproj` is its vision part, by
    default the only `mmproj*.gguf` beside it; without one the model answers text.

    `GGUFError` with one sentence for files that are damaged, are no model of Keye, or do not belong together.
    """
    model = model.absolute()
    if mmproj is None:
        mmproj = find_mmproj(model)
    elif not mmproj.is_file():
        raise GGUFError(f"{mmproj} does not exist; give the mmproj file of the model, or leave it out for text")
    elif not is_gguf(mmproj):
        raise GGUFError(f"{mmproj} is not a GGUF file; give the mmproj file of the model")
    files = (model, None if mmproj is None else mmproj.absolute())
    stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file is not None)
    return _write(*files, stamps)


def find_mmproj(model: Path) -> Path | None:
    """The only vision part beside a model; None where there is none. `GGUFError` where there are several."""
    candidates = sorted(path for path in model.parent.iterdir() if is_mmproj(path) and path.name != model.name)
    if len(candidates) > 1:
        listed = ", ".join(path.name for path in candidates[:5])
        raise GGUFError(f"beside {model} are {len(candidates)} vision parts ({listed}); name one of them with mmproj")
    return candidates[0] if candidates else None


def is_mmproj(path: Path) -> bool:
    """Whether a file is called as vision parts are."""
    return path.suffix.lower() == ".gguf" and "mmproj" in path.name.lower()


def read_link(folder: Path) -> tuple[Path, Path | None] | None:
    """The model and the vision part that a folder stands for; None for any other folder."""
    path = folder / LINK
    if not path.exists():
        return None
    link = json.loads(path.read_text(encoding="utf-8"))
    return Path(link["model"]), None if link["mmproj"] is None else Path(link["mmproj"])


@functools.lru_cache(maxsize=16)
def _write(model: Path, mmproj: Path | None, _stamps: tuple[tuple[int, int], ...]) -> Path:
    file, vision = read_gguf(model), None if mmproj is None else read_gguf(mmproj)
    if vision is not None:
        check_vision(vision)
    config = read_config(file, vision, read_tokens(file))
    tokenizer, template = read_tokenizer(file, config["vocab_size"]), read_template(file)
    contents: dict[str, Any] = {"config.json": config, **read_files(file, vision)}
    if tokenizer is not None:
        contents["tokenizer.json"] = tokenizer
    contents[LINK] = {"model": str(model), "mmproj": None if mmproj is None else str(mmproj)}
    folder = Path(tempfile.mkdtemp(prefix="keye-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
