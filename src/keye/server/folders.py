"""The folder in which a server or a batch keeps files, which goes with it; one of a process that was killed goes when
the next one starts. Knows folders, not what is in them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import IO, Final

log: Final = logging.getLogger("keye.server")
#: How the names of these folders begin, of servers and of batches, and the file in each that its process holds a lock
#: on for as long as it lives.
PREFIX: Final = "keye-serve-"
BATCH_PREFIX: Final = "keye-batch-"
LOCK: Final = "lock"


class ServerFolder:
    """A private folder, made now. A server of the same user that starts later leaves it alone until this process is
    gone, however that ends."""

    def __init__(self, prefix: str = PREFIX) -> None:
        remove_abandoned()
        self._home = Path(tempfile.mkdtemp(prefix=prefix))  # only this user may enter it
        self._lock: IO[bytes] = (self._home / LOCK).open("xb")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = self._home / "files"
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._lock.close()


def remove_abandoned() -> None:
    """Removes folders of servers that were killed: those of this user whose lock nobody holds."""
    try:
        entries = [
            entry for entry in os.scandir(tempfile.gettempdir()) if entry.name.startswith((PREFIX, BATCH_PREFIX))
        ]
    except OSError:
        return
    for entry in entries:
        try:
            _remove_if_abandoned(entry)
        except OSError as error:
            log.debug("%s was not removed: %s", entry.path, error)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if not ours:
        return
    # A folder without a lock file is about to get one; it stays.
    descriptor = os.open(os.path.join(entry.path, LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where its server lives
        shutil.rmtree(entry.path, ignore_errors=True)
        log.warning("removed %s, which a process that was killed had left", entry.path)
    finally:
        os.close(descriptor)
