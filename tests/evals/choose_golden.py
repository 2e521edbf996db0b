"""Writes the committed part of the golden scoring data: a sample of each file that covers its forms.

    python tests/evals/choose_golden.py FOLDER [--output tests/evals/golden] [--seed 0] [--bytes 13000]

Of each file: first a line of every kind and implementation, then of every tag, then others, each in an order drawn by
the seed, until the size is reached. An aggregate comes with the items that it names; the smallest is tried first.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

Line = tuple[int, str, dict[str, Any]]  # place in the file, text, value


def choose_lines(lines: list[Line], size: int, seed: int) -> list[Line]:
    """Lines of `size` bytes at most together, in the order of the file."""
    by_id = {line[2]["id"]: line for line in lines}
    order = random.Random(seed).sample(lines, len(lines))
    # Aggregates are long or bring many items along, so that small ones of them come first.
    order.sort(
        key=lambda line: line[2]["kind"] == "aggregate" and sum(len(part[1]) for part in _list_group(line, by_id))
    )
    forms: set[tuple[str, str]] = set()
    ranks: dict[int, int] = {}
    for place, _, value in order:
        scorers = {(value["kind"], name) for name in value["official"]}
        tags = {(value["kind"], f"tag {value.get('tag')}")}
        ranks[place] = 0 if scorers - forms else 1 if tags - forms else 2
        forms |= scorers | tags
    order.sort(key=lambda line: ranks[line[0]])
    chosen: dict[int, Line] = {}
    room = size
    for line in order:
        group = [member for member in _list_group(line, by_id) if member[0] not in chosen]
        cost = sum(len(member[1].encode()) + 1 for member in group)
        if cost <= room:
            room -= cost
            chosen |= {member[0]: member for member in group}
    return [chosen[place] for place in sorted(chosen)]


def _list_group(line: Line, by_id: dict[str, Line]) -> list[Line]:
    return [line, *(by_id[name] for name in line[2]["input"].get("items", []))]


def main() -> None:
    parser = argparse.ArgumentParser(description="write the committed part of the golden scoring data")
    parser.add_argument("folder", type=Path, help="the complete data")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "golden")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=13_000, help="of each file")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(arguments.folder.glob("*.jsonl")):
        texts = path.read_text(encoding="utf-8").split("\n")
        lines = [(place, text, json.loads(text)) for place, text in enumerate(texts) if text]
        chosen = choose_lines(lines, arguments.bytes, arguments.seed)
        (arguments.output / path.name).write_text("".join(f"{line[1]}\n" for line in chosen), encoding="utf-8")
        print(f"{path.name}: {len(chosen)} of {len(lines)} lines")


if __name__ == "__main__":
    main()
