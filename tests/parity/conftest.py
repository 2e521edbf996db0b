"""Parity with the official implementation: recorded cases in a folder, one test each, one line at the end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

COMMITTED = HERE.parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", help="folder of recorded cases (else KEYE_GOLDEN, else tests/golden)")


def golden_folder(config: pytest.Config) -> Path:
    """The folder of cases; a usage error when it is missing or holds none."""
    # The option is unknown when pytest was started on a folder above this one.
    chosen = config.getoption("--golden", default=None) or os.environ.get("KEYE_GOLDEN") or COMMITTED
    folder = Path(chosen)
    if not any(folder.glob("*/case-*.json")):
        raise pytest.UsageError(f"{folder} holds no <set>/case-*.json; give a folder of recorded cases with --golden")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        from tests.support.parity.cases import discover

        cases = discover(golden_folder(metafunc.config))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def parity_counts(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Cases by outcome; a case that failed to start counts as failed."""
    counts: Counter[str] = Counter()
    outcome_of = {"passed": "passed", "failed": "failed", "error": "failed", "skipped": "not_applicable"}
    for outcome, name in outcome_of.items():
        for report in reporter.stats.get(outcome, []):
            counts[name] += "parity/test_parity.py::test_case[" in getattr(report, "nodeid", "")
    return counts


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> object:
    """The line comes after pytest's own summary, as the very last one."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (counts := parity_counts(reporter)).total():
        reporter.write_line(
            f"parity: passed={counts['passed']} failed={counts['failed']} not_applicable={counts['not_applicable']}"
        )
    return result
