"""Official scorers against golden data: a test for each file and implementation, one line of counts at the end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from keye.errors import KeyeError

COMMITTED = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-evals", metavar="DIR", help="folder of golden scoring data, *.jsonl (else tests/evals/golden)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" not in metafunc.fixturenames:
        return
    from tests.support.golden_evals import GoldenFile

    # The option is unknown when pytest was started on a folder above this one.
    folder = Path(metafunc.config.getoption("--golden-evals", default=None) or COMMITTED)
    files = [GoldenFile(path) for path in sorted(folder.glob("*.jsonl"))]
    if not files:
        raise pytest.UsageError(f"{folder} holds no *.jsonl; give a folder of golden data with --golden-evals")
    try:
        pairs = [(file, name) for file in files for name in file.implementations]
    except KeyeError as error:
        raise pytest.UsageError(str(error)) from None
    names = [f"{file.path.stem}-{name}" for file, name in pairs]
    metafunc.parametrize(("golden_file", "implementation"), pairs, ids=names)


def scoring_counts(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Results by outcome, over all tests; they travel as properties of reports, from other processes too."""
    counts: Counter[str] = Counter()
    for reports in reporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "scoring" and getattr(report, "when", "") == "call":
                    counts.update(value)
    return counts


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> object:
    """The line comes after pytest's own summary, as the very last line."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (counts := scoring_counts(reporter)).total():
        reporter.write_line(f"scoring: passed={counts['passed']} failed={counts['failed']} skipped={counts['skipped']}")
    return result
