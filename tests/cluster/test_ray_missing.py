"""Without Ray one sentence says what to install."""

from __future__ import annotations

import sys

import pytest

from keye.cluster.service import open_service
from keye.errors import KeyeError


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        KeyeError, match=r"ray is not installed, which ray://head:10001 needs; pip install 'keye\[ray\]'"
    ):
        open_service("ray://head:10001")
