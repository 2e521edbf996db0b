"""docs/evaluation.md: every known fault, every field of a result, tasks and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keye.cli import cli
from keye.evals.faults import FAULTS
from keye.evals.task import find_tasks

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"keye eval [a-z][^`\n#]*", PAGE)))


def test_every_known_fault_is_listed() -> None:
    assert [task for task, fault in FAULTS.items() if f"| `{task}` | {fault} |" not in PAGE] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_tasks_and_options_that_exist(command: str) -> None:
    words = command.split()[2:]
    group = cli.get_command(None, "eval")  # type: ignore[arg-type]
    verbs = group.list_commands(None)
    verb = words[0] if words[0] in verbs else "run"
    known = {name for option in group.get_command(None, verb).params for name in (*option.opts, *option.secondary_opts)}
    assert [word for word in words if word.startswith("-") and word not in known] == []
    options = [place for place, word in enumerate(words) if word.startswith("-")]
    names = words[: options[0]] if options else words
    for name in names if verb == "run" else names[1:2] if verb in ("curve", "prepare") else ():
        assert find_tasks(name)
