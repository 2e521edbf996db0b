"""How the table of a quantised model looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from keye.commands.shared.show import stdout
from keye.units import format_bytes, one_line


def print_quant_report(report: Mapping[str, Any]) -> None:
    """The contents of quantization.json as a table and a line of sums."""
    console = stdout()
    console.print(quant_table(report))
    sums = (f"{format_bytes(report['bytes'])} of {format_bytes(report['source_bytes'])}; "
            f"{report['share_quantised']:.1%} of the bytes were quantised")  # fmt: skip
    if report["dropped"]:
        sums += f"; left out {format_bytes(report['dropped_bytes'])} that no forward pass reads"
    console.print(Text(one_line(sums)))


def quant_table(report: Mapping[str, Any]) -> Table:
    """Part, format, bytes and relative error."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("part", overflow="fold")
    table.add_column("format", overflow="fold")
    for name in ("before", "after", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    weighted = any(row["weighted_error"] is not None for row in report["rows"])
    if weighted:
        table.add_column("by data", justify="right", no_wrap=True)
    for row in report["rows"]:
        cells = [row["part"], row["format"], format_bytes(row["source_bytes"]), format_bytes(row["bytes"]),
                 _share(row["error"])]  # fmt: skip
        table.add_row(*cells, *([_share(row["weighted_error"])] if weighted else []))
    return table


def _share(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"
