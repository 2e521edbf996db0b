"""The help texts in docs/cli.md: python tests/support/help_blocks.py rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

import click

from keye.cli import cli

DOCS = Path(__file__).parents[2] / "docs/cli.md"
_BLOCK = re.compile(r"(<!-- help: (keye[\w ]*) -->\n```text\n).*?(```\n<!-- end -->)", re.DOTALL)


def help_text(command_line: str) -> str:
    """What `COMMAND -h` prints in a terminal of 100 columns."""
    first, *names = command_line.split()
    command, context = cli, _context(cli, first)
    for name in names:
        assert isinstance(command, click.Group)
        result = command.get_command(context, name)
        assert result is not None, f"{command_line} is not a command"
        command, context = result, _context(result, name, context)
    return command.get_help(context) + "\n"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return command.make_context(name, [], parent, resilient_parsing=True, terminal_width=100)


def with_current_help(text: str) -> str:
    """The document with every help block as it should be."""
    return _BLOCK.sub(lambda block: block[1] + help_text(block[2]) + block[3], text)


def documented(text: str) -> list[str]:
    """The command lines whose help the document shows."""
    return [block[2] for block in _BLOCK.finditer(text)]


if __name__ == "__main__":
    DOCS.write_text(with_current_help(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
