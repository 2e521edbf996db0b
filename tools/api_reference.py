"""Write docs/api.md from the docstrings of `keye.__all__` and `keye.spi.__all__`.

    python tools/api_reference.py [--check]

With `--check`, exits with 1 where the file is not what would be written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs/api.md"
INTRODUCTION = """\
# Python API

<!-- Written by tools/api_reference.py from docstrings. -->

The names that a release keeps, by the policy in [CONTRIBUTING.md](../CONTRIBUTING.md#what-is-public). Anything else in
the package may change at any time.
"""


class _Text(str):
    """An annotation as it stands in the source: `inspect` would put quotes around a string."""

    def __repr__(self) -> str:
        return str(self)


def signature(function: Any, name: str) -> str:
    """`name(arguments) -> result`, one argument a line where it is long."""
    original = inspect.signature(function)
    parameters = [p.replace(annotation=_text(p.annotation)) for p in original.parameters.values() if p.name != "self"]
    result = original.replace(parameters=parameters, return_annotation=_text(original.return_annotation))
    line = f"{name}{result}"
    if len(line) <= 100:
        return line
    parts: list[str] = []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(str(parameter))
    ending = "" if result.return_annotation is inspect.Signature.empty else f" -> {result.return_annotation}"
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){ending}"


def _text(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) else annotation


def code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def document(value: Any) -> str:
    return (inspect.getdoc(value) or "") + "\n"


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public attributes that keye defines for a class or its bases, in the order of the source."""
    seen = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "keye":
            for name, value in vars(base).items():
                if not name.startswith("_") and name not in seen:
                    seen.add(name)
                    yield name, value


def describe_class(cls: type, path: str) -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    is_made_by_users = not getattr(cls, "_is_protocol", False) and not issubclass(cls, tuple)
    text = cls.__doc__ or ""
    if is_made_by_users and not fields and "__init__" in vars(cls):
        yield code(signature(cls, path))
    if not re.match(rf"{cls.__name__}\(", text):  # what dataclass writes without a docstring
        yield document(cls)
    if fields:
        lines = [f"{field.name}: {field.type}" for field in fields.values() if not field.name.startswith("_")]
        yield code("\n".join(lines))
    for name, value in members(cls):
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            prefix = "async " if inspect.iscoroutinefunction(function) else ""
            yield f"#### `{cls.__name__}.{name}`\n"
            yield code(prefix + signature(getattr(cls, name) if function is not value else function, name))
            yield document(function)
        elif isinstance(value, property) and value.fget is not None:
            yield f"#### `{cls.__name__}.{name}`\n"
            yield code(f"{name}: {value.fget.__annotations__.get('return', 'Any')}")
            yield document(value)


def describe(module: ModuleType) -> Iterator[str]:
    yield f"## `{module.__name__}`\n"
    yield document(module)
    for name in sorted(module.__all__, key=str.lower):
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        yield f"### `{path}`\n"
        if inspect.isclass(value):
            yield from describe_class(value, path)
        elif inspect.isroutine(value):
            yield code(signature(value, path))
            yield document(value)
        elif isinstance(value, str | int | float):
            yield f"A constant of type `{type(value).__name__}`.\n"
        elif isinstance(value, frozenset):
            yield code(f"{path} = {sorted(value)}")
        else:
            yield code(f"{path} = {value}")


def render() -> str:
    names = ["keye", *(["keye.spi"] if importlib.util.find_spec("keye.spi") else [])]
    blocks = (block for name in names for block in describe(importlib.import_module(name)))
    text = "\n".join(block for block in (INTRODUCTION, *blocks) if block.strip())
    assert " at 0x" not in text, "a default has no repeatable form"
    return re.sub(r"\n{3,}", "\n\n", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(render(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != render():
        print("docs/api.md does not match the docstrings; run: python tools/api_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
