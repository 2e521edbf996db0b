"""The table of tasks in docs/benchmarks-data.md: python -m tests.support.task_table rewrites it."""

from __future__ import annotations

import re
from pathlib import Path

from keye.evals.tables import TableTask
from keye.evals.task import Task, list_tasks

DOCS = Path(__file__).parents[2] / "docs/benchmarks-data.md"
_TABLE = re.compile(r"(<!-- tasks -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = (
    "| task | measures | data | licence, gate | questions | metric | official scorers |\n"
    "|---|---|---|---|---|---|---|\n"
)  # fmt: skip


def _row(task: Task) -> str:
    rows = task.rows if isinstance(task, TableTask) else None
    licence = f"{task.licence}; {task.gate}" if task.gate else task.licence
    if task.available:
        licence = f"{licence}; not available: {task.available}"
    cells = (
        f"`{task.name}`", task.measures, task.source or "none", licence, f"{rows:,}" if rows else "-", task.metric,
        ", ".join(task.official) or "-",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def with_current_table(text: str) -> str:
    """The document with the table as it should be."""
    rows = "".join(_row(task) for task in list_tasks())
    return _TABLE.sub(lambda block: f"{block[1]}\n{_HEAD}{rows}\n{block[2]}", text)


if __name__ == "__main__":
    DOCS.write_text(with_current_table(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
