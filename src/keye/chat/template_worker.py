"""The program that renders a checkpoint's chat templates, in a process of its own that may be killed.

For each line of standard input, one JSON object, it writes a line to standard output: `{"text": ...}` or
`{"error": ...}`. Imports nothing of keye. A template is an untrusted program: the sandbox keeps it from reaching
Python, and the limits of this process end one that loops, counts or doubles its text for ever.
"""

from __future__ import annotations

import json
import math
import re
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request["memory_bytes"], request["cpu_seconds"])
        try:
            answer = {"text": render(request["template"], request["variables"], request["nonce"], request["max_chars"])}
            line = json.dumps(answer)
        except MemoryError:
            line = json.dumps({"error": "needs too much memory"})
        except Exception as error:  # noqa: BLE001 - a template can raise anything, and all of it is its own fault
            line = json.dumps({"error": f"{type(error).__name__}: {error}"[:300]})
        print(line, flush=True)


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
        line = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return text_mark.sub("KJ", line)

    return to_json


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Caps address space and CPU time of this process from now on, and forbids it to write files. No-op where
    unsupported."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime)
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: used + cpu_seconds, resource.RLIMIT_FSIZE: 0,
              resource.RLIMIT_CORE: 0}  # fmt: skip
    for kind, value in limits.items():
        # The soft limit alone, which the next request raises again: a template cannot reach it from the sandbox.
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
