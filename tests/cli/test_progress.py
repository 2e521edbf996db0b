"""Progress of long work: a share that never falls, and the time left, also without a terminal."""

from __future__ import annotations

import pytest

from keye.commands.shared import show
from keye.engine.request import Progress


def test_share_and_time_left() -> None:
    now = [0.0]
    share = show.Share(lambda: now[0])
    assert str(share) == "0%"
    share.add("encode", 50, 100)
    now[0] = 2.0
    assert str(share) == "50%", "no time left is shown in the first three seconds"
    now[0] = 4.0
    assert str(share) == "50%, about 4 s left"
    share.add("prefill", 10, 300)
    assert share.share == 0.5, "a phase that begins takes nothing back"
    share.add("encode", 100, 100)
    share.add("prefill", 200, 300)
    now[0] = 400.0
    assert str(share) == "75%, 3 min left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "about 1 s left"), (12.0, "about 15 s left"), (100.0, "2 min left"), (7200.0, "2.0 h left")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert show.time_left(seconds) == text


def test_lines_without_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 3))
    share = show.Share
    monkeypatch.setattr(show, "Share", lambda: share(lambda: float(next(seconds))))
    with show.watching("watching") as on_progress:
        on_progress(Progress("media", 0, 1))
        for done in range(0, 101, 10):
            on_progress(Progress("prefill", done, 100))
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) < 11
    assert all(line.startswith("keye: watching: ") and line.endswith(" left") for line in lines)
