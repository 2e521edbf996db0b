"""What `make audit` says of the answers of the database."""

from __future__ import annotations

from tools.audit import report

CLEAN = {"name": "clean", "version": "1.0", "vulns": []}
BAD = {
    "name": "bad",
    "version": "0.9",
    "vulns": [{"id": "CVE-1", "fix_versions": ["1.0"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "unknown", "version": "1", "skip_reason": "Dependency not found"}


def test_vulnerable_packages_fail() -> None:
    lines, vulnerable = report([CLEAN, BAD])
    assert vulnerable
    assert lines[:2] == ["bad 0.9: CVE-1, fixed in 1.0", "bad 0.9: CVE-2, fixed in no release yet"]


def test_packages_that_the_database_does_not_know_are_named() -> None:
    lines, vulnerable = report([CLEAN, UNKNOWN])
    assert not vulnerable
    assert lines == [
        "1 packages checked, 0 known vulnerabilities",
        "not checked, as the database does not know them: unknown",
    ]


def test_silence_is_not_a_clean_record() -> None:
    for dependencies in ([], [UNKNOWN]):
        assert report(dependencies) == (
            ["the database of vulnerabilities could not be reached: nothing was checked"],
            False,
        )
