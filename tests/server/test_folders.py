"""What a server leaves when it is killed goes when the next one starts; what others keep stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from keye.files import LOCK, SERVER_PREFIX, PrivateFolder
from keye.server.edge.errors import ApiError
from keye.server.settings import Settings
from keye.server.stores import FileStore

HOLD = (
    "import sys; from keye.files import PrivateFolder; folder = PrivateFolder(); "
    "(folder.path / 'upload').write_text('x'); print(folder.path, flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_folders_of_killed_servers_are_removed_and_of_live_ones_stay(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        theirs = Path(other.stdout.readline().decode().strip())
        PrivateFolder().remove()
        assert (theirs / "upload").is_file(), "its server lives"
        other.kill()
        other.wait()
    ours = PrivateFolder()
    assert not theirs.exists() and not theirs.parent.exists()
    ours.remove()
    assert not list(temporary.iterdir())


def test_folders_that_no_server_made_stay(temporary: Path) -> None:
    plain, open_to_all, link = (temporary / f"{SERVER_PREFIX}{name}" for name in ("plain", "open", "link"))
    plain.mkdir(mode=0o700)
    open_to_all.mkdir()
    os.chmod(open_to_all, 0o755)
    (open_to_all / LOCK).touch()
    (temporary / "target").mkdir(mode=0o700)
    (temporary / "target" / LOCK).touch()
    link.symlink_to(temporary / "target")
    PrivateFolder().remove()
    assert plain.is_dir() and open_to_all.is_dir() and link.is_symlink() and (temporary / "target" / LOCK).is_file()


def test_one_key_cannot_take_the_room_of_others() -> None:
    store = FileStore(Settings(keys={"a": "a" * 16, "b": "b" * 16}, stored_bytes=1000, stored_files=2))
    try:
        paths = [store.begin("a") for _ in range(2)]
        with pytest.raises(ApiError, match="too many files"):
            store.begin("a")
        other = store.begin("b")
        store.grow(paths[0], 200)
        with pytest.raises(ApiError, match="all the room that one key may have"):
            store.grow(paths[1], 51)
        store.grow(other, 250)
    finally:
        store.close()
    assert Settings(stored_bytes=1000).bytes_of_key == 1000
    assert Settings(stored_bytes=1000, key_bytes=10).bytes_of_key == 10
