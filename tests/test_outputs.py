"""Nothing is replaced that keye did not write, and a full disk leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.commands.ask import check_evidence
from keye.commands.serve import audit_log
from keye.commands.shared.outputs import save_picture
from keye.errors import KeyeError
from keye.files import check_output, complete_file, has_mark, output_file
from keye.media.clips import cut_clips
from keye.server.edge.audit import Record


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_our_pictures_are_known_and_those_of_others_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.new("RGB", (8, 8)).save(path)
    before = path.read_bytes()
    with pytest.raises(KeyeError, match="exists and is not an earlier output of this kind"):
        check_evidence(path, [], False)
    check_evidence(path, [], True)
    assert path.read_bytes() == before
    save_picture(Image.new("RGB", (300, 300)), path)
    check_evidence(path, [], False)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"question": "mine", "answer": 42}', "no JSON", "[" * 100_000])
def test_evidence_as_json_replaces_nothing_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(KeyeError, match="exists and is not an earlier output"):
        check_evidence(path, [], False)
    path.write_text(json.dumps(dict.fromkeys(("question", "answer", "intervals", "media", "steps", "reason"))))
    check_evidence(path, [], False)


def test_what_is_not_a_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null"), tmp_path / "none" / "a"):
        with pytest.raises(KeyeError):
            check_output(path, has_mark, overwrite=True)
    (tmp_path / "empty").touch()
    check_output(tmp_path / "empty", has_mark)
    check_output(tmp_path / "new", has_mark)


def test_a_link_is_kept_and_its_file_replaced(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    file.parent.mkdir()
    link.symlink_to(file)
    with complete_file(link) as draft:
        draft.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_an_audit_log_is_added_to_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    for _ in range(2):
        with audit_log(log) as audit:
            assert audit is not None
            audit.log(Record("now", "1"))
    assert len(log.read_text().splitlines()) == 2
    log.write_text('{"mine": 1}\n')
    with pytest.raises(KeyeError, match="not an audit log of keye"), audit_log(log):
        pass
    assert log.read_text() == '{"mine": 1}\n'


def test_a_full_disk_leaves_nothing(tmp_path: Path, clip_file: Path) -> None:
    """Played by drafts that lie on a device which is always full."""
    folder = tmp_path / "out"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8))

    def full(name: str) -> Path:
        (folder / f".{name}.{os.getpid()}.part").symlink_to("/dev/full")
        return folder / name

    with pytest.raises(KeyeError, match=r"no room is left to write .*a\.json"), output_file(full("a.json")) as draft:
        draft.write_text("x")
    for name in ("a.png", "a.jpg", "a.webp"):
        with pytest.raises(KeyeError, match=f"no room is left to write .*{name}"):
            save_picture(noise, full(name))
    full("a-002-0.5s-1.0s.mp4")
    with pytest.raises(KeyeError, match=r"no room is left to write .*out"):
        cut_clips(clip_file, [(0.0, 0.5), (0.5, 1.0)], folder)
    assert list(folder.iterdir()) == []


@pytest.fixture
def clip_file(tmp_path: Path) -> Path:
    from keye.data.frameforge import make_clip, write_mp4

    write_mp4(make_clip(1, frames=10, start=0.0, step=0.1), tmp_path / "a.mp4", (112, 112))
    return tmp_path / "a.mp4"


def test_failures_are_one_sentence(tmp_path: Path) -> None:
    message = r"gone/a cannot be written \(No such file or directory\): name another place"
    with pytest.raises(KeyeError, match=message), output_file(tmp_path / "gone" / "a") as draft:
        draft.write_text("x")
