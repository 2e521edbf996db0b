"""What the command line makes of files by their names and contents."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["data: notes.mp4", "http: clip.mp4", "-clip.mp4", "--clip.mp4", "~clip.mp4", "a?#%.mp4"]
)
def test_a_file_is_opened_whatever_its_name(run: Callable[..., Any], video: Path, folder: Path, name: str) -> None:
    shutil.copy(video, folder / name)
    result = run("plan", name, "--json")
    assert (result.code, result.data["media"][0]["name"]) == (0, name), result.err


def test_flags_stay_flags_where_files_are_called_like_them(run: Callable[..., Any], video: Path, folder: Path) -> None:
    shutil.copy(video, folder / "--json")
    assert run("plan", video, "--json").data["media"][0]["name"] == video.name


def test_a_heic_photo(run: Callable[..., Any], folder: Path) -> None:
    pillow_heif.from_pillow(Image.new("RGB", (120, 60))).save("photo.heic")
    media = run("plan", "photo.heic", "--json").data["media"][0]
    assert (media["source_width"], media["source_height"], media["notes"]) == (120, 60, [])


def test_a_pdf(run: Callable[..., Any], folder: Path) -> None:
    (folder / "scan.pdf").write_bytes(b"%PDF-1.7\n")
    message = "keye: scan.pdf is a PDF document, which is not read; convert its pages to PNG and give those as images\n"
    for arguments in (
        ("plan", "scan.pdf"),
        ("ask", "scan.pdf", "how many pages?"),
        ("ground", "scan.pdf", "a page turns"),
    ):
        result = run(*arguments)
        assert (result.code, result.out, result.err) == (2, "", message)


def test_unused_pages_are_noted(run: Callable[..., Any], folder: Path) -> None:
    pages = [Image.new("RGB", (60, 40), (90 * i, 0, 0)) for i in range(3)]
    pages[0].save("a.tif", save_all=True, append_images=pages[1:])
    message = "a.tif: it has 3 pages, of which only the first is used; save the others as files of their own"
    assert run("plan", "a.tif").err == f"keye: {message}\n"
