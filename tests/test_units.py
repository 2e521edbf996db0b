"""Byte sizes: the same words mean the same number of bytes everywhere."""

from __future__ import annotations

import pytest

from keye.errors import KeyeError
from keye.units import format_bytes, format_count, listed, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("8 gib", 8 * 2**30), ("500MB", 500 * 10**6), ("1.5 TiB", 3 * 2**39),
        ("4096", 4096), (4096, 4096), ("12 B", 12), ("1kB", 1000), ("1KiB", 1024), (" 2MB ", 2_000_000),
    ],
)  # fmt: skip
def test_units_of_sizes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text, "memory") == nbytes


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "8XB", "GB", "eight", "1e3", "8GiBs", "0.0001B", "1" * 16])
def test_sizes_that_are_not_valid(text: str) -> None:
    with pytest.raises(KeyeError, match="^memory is .*; write a size such as 8GiB or 500MB$"):
        parse_bytes(text, "memory")


def test_a_letter_alone_is_ambiguous() -> None:
    with pytest.raises(KeyeError, match="^memory is '8G'; write 8GB for powers of 1000 or 8GiB for powers of 1024$"):
        parse_bytes("8G", "memory")
    with pytest.raises(KeyeError, match="write 1.5kB for powers of 1000 or 1.5KiB"):
        parse_bytes("1.5k", "memory")


def test_sizes_and_counts_as_text() -> None:
    sizes = (0, 12, 1500, 26_555_776, 62_244_164_320, 10**13, 1023 * 2**20, 4 * 2**30)
    words = ["0 B", "12 B", "1.46 KiB", "25.3 MiB", "58 GiB", "9.09 TiB", "1023 MiB", "4 GiB"]
    assert [format_bytes(n) for n in sizes] == words
    assert [parse_bytes(word, "size") for word in words[-2:]] == list(sizes[-2:])
    assert [format_count(n) for n in (999, 13_277_888, 31_122_082_160)] == ["999", "13.28 million", "31.12 billion"]


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
