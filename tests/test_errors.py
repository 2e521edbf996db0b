"""Which name was probably meant by an unknown one."""

from __future__ import annotations

import pytest

from keye.errors import closest

KNOWN = ("temperature", "top_p", "top_k", "max_tokens", "n", "stop", "stream")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("tempreature", "temperature"),
        ("Temperature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("top_n", "top_k"),
        ("stops", "stop"),
        ("pots", None),
        ("sotp", "stop"),
        ("m", None),
        ("metadata", None),
        ("max_new_tokens", None),
        ("temperature", None),
        ("x" * 10_000, None),
        ("", None),
    ],
)
def test_closest(name: str, meant: str | None) -> None:
    assert closest(name, KNOWN) == meant
