"""The program that renders a checkpoint's chat template, in a process of its own that may be killed.

Reads one JSON object from standard input, writes one to standard output: `{"text": ...}` or `{"error": ...}`. Imports
nothing of keye. A template is a program from a stranger: the sandbox keeps it from reaching Python, and the limits of
this process end one that loops, counts or doubles its text for ever.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    request = json.load(sys.stdin)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    try:
        answer = {"text": render(request["template"], request["variables"], request["nonce"], request["max_chars"])}
    except MemoryError:
        answer = {"error": "needs too much memory"}
    except Exception as error:  # noqa: BLE001 - a template can raise anything, and all of it is its own fault
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    json.dump(answer, sys.stdout)


def render(template: str, variables: dict[str, Any], nonce: str, max_chars: int) -> str:
    """The text of a template; whitespace around blocks is treated as `transformers` does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json(nonce)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(str(form))}
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(**variables):
        length += len(piece)
        if length > max_chars:
            raise TemplateError(f"it writes more than {max_chars:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _to_json(nonce: str) -> Any:
    """JSON without HTML escapes. A stand-in for text is marked, so that its text is escaped as JSON asks."""
    text_mark = re.compile(f"KT(?={nonce})")

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        written = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return text_mark.sub("KJ", written)

    return to_json


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Caps address space and CPU time of this process, and forbids it to write files. No-op where unsupported."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_FSIZE: 0,
              resource.RLIMIT_CORE: 0}  # fmt: skip
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
