"""The names of `keye.spi` with their signatures, as `tests/spi_contract.txt` has them.

python -m tests.support.spi_contract     writes that file; a change of it is a change for plug-ins
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keye import spi

FILE = Path(__file__).parents[1] / "spi_contract.txt"


def describe_all() -> str:
    """Every public name, sorted, with what a caller relies on."""
    return "".join(f"{name}{_describe(getattr(spi, name))}\n" for name in sorted(spi.__all__))


def _describe(value: Any) -> str:
    if inspect.isclass(value):
        members = "".join(f"\n    {line}" for line in sorted(_members(value)))
        return f": class{members}"
    if inspect.isfunction(value):
        return _signature(value)
    return f": {type(value).__name__}"


def _members(value: type) -> Iterator[str]:
    fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    yield from (f"{name}: field" for name in fields)
    if not fields and "__init__" in vars(value) and not getattr(value, "_is_protocol", False):
        yield f"__init__{_signature(value.__init__)}"
    for name, member in vars(value).items():
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if not name.startswith("_") and name not in fields:
            if inspect.isfunction(member):
                yield f"{name}{_signature(member)}"
            elif hasattr(member, "__get__"):
                yield f"{name}: property"


def _signature(value: Any) -> str:
    """Names of parameters, with `=` where they have a default: annotations and defaults may be worded otherwise."""
    names: list[str] = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in names):
            names.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" * (parameter.kind is parameter.VAR_KEYWORD)
        names.append(f"{star}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return f"({', '.join(names)})"


if __name__ == "__main__":
    FILE.write_text(describe_all())
    print(f"{len(spi.__all__)} names in {FILE}")
