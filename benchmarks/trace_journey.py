"""How much of keye runs for a question: modules, classes and functions from the command or request to the last token.

    python -m benchmarks.trace_journey ask          # keye ask demo.mp4 "...", loading included
    python -m benchmarks.trace_journey chat         # POST /v1/chat/completions, the video in a data: URL
    python -m benchmarks.trace_journey ask --list   # the names; "<-" names the caller of a function that has only one

`ask` traces `keye.cli.main` from its import on. `chat` traces the application without its guard, the model loaded and
`keye.server` imported before: from the start of its lifespan through one request to the end of the lifespan.

Counting rules. A profile function (`sys.setprofile`, `threading.setprofile`) sees every Python call in all threads of
this process; child processes (decode workers) are not seen. Counted are code objects of files of the package keye that
run at least once:

* functions: distinct (file, qualified name). Methods, properties, nested functions, generators and coroutines count
  once each. The body of a class that is defined during the trace counts as one function. Module bodies, lambdas,
  comprehensions and generator expressions do not count, nor does generated code (`__init__` of a dataclass).
* classes: those with a counted method, by qualified name; an inherited method belongs to the class that defines it.
* modules: files with a counted function.

At 078162a, where the review counted 92 modules / 76 classes / 734 functions (ask) and 70 / 78 / 486 (chat), these rules
give 92 / 75 / 734 and 70 / 76 / 486 in CPython 3.11.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

QUESTION = "when is the red circle visible?"


class Trace:
    """Code objects that ran, each with the code objects that called it."""

    def __init__(self) -> None:
        self.callers: defaultdict[CodeType, set[CodeType]] = defaultdict(set)

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records the calls of this thread and of all threads that start inside the block."""
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            caller = frame.f_back
            self.callers[frame.f_code].update(() if caller is None else (caller.f_code,))

    def functions(self, package: Path) -> dict[tuple[str, str], set[str]]:
        """(module, qualified name) of the counted functions of `package` -> their callers."""
        functions: dict[tuple[str, str], set[str]] = {}
        for code, callers in self.callers.items():
            if Path(code.co_filename).is_relative_to(package) and not code.co_name.startswith("<"):
                names = functions.setdefault((_module(package, code), code.co_qualname), set())
                names.update(_caller(package, caller) for caller in callers)
        return functions


def _module(package: Path, code: CodeType) -> str:
    path = Path(code.co_filename).relative_to(package.parent).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__")


def _caller(package: Path, code: CodeType) -> str:
    if not Path(code.co_filename).is_relative_to(package):
        return f"{Path(code.co_filename).stem}:{code.co_name}"
    return f"{_module(package, code)}:{code.co_qualname}"


def trace_ask(trace: Trace, package: Path) -> None:
    """Runs `keye ask` in this process; its output is dropped."""
    with contextlib.redirect_stdout(io.StringIO()) as out, trace.record():
        from keye.cli import main

        code = main(["ask", str(package / "assets/demo.mp4"), QUESTION])
    assert code == 0, f"keye ask failed with exit code {code}: {out.getvalue()}"


def trace_chat(trace: Trace, package: Path) -> None:
    """Sends one chat completion through the ASGI application."""
    import httpx

    import keye
    from keye.server.app import create_app

    model = keye.load("nano")
    video = base64.b64encode((package / "assets/demo.mp4").read_bytes()).decode()
    content = [
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{video}"}},
        {"type": "text", "text": QUESTION},
    ]
    app = create_app(model)

    async def ask() -> None:
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            body = {"model": "nano", "messages": [{"role": "user", "content": content}]}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text

    with trace.record():
        asyncio.run(ask())


def summarize(functions: dict[tuple[str, str], set[str]]) -> dict[str, Any]:
    """The three counts, and the modules of each sub-package."""
    modules = {module for module, _ in functions}
    owners = {(module, name.rpartition(".")[0]) for module, name in functions}
    packages: defaultdict[str, int] = defaultdict(int)
    for module in modules:
        packages[module.split(".")[1] if module.count(".") > 1 else "keye"] += 1
    return {
        "modules": len(modules),
        "classes": sum(bool(owner) and not owner.endswith("<locals>") for _, owner in owners),
        "functions": len(functions),
        "modules_by_package": dict(sorted(packages.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journey", choices=["ask", "chat"])
    parser.add_argument("--json", action="store_true", help="print JSON, with --list including the names")
    parser.add_argument("--list", action="store_true", help="print the name of every counted function")
    options = parser.parse_args()
    import importlib.util

    spec = importlib.util.find_spec("keye")  # finds the package without running it
    assert spec is not None and spec.origin is not None, "keye is not installed"
    package = Path(spec.origin).parent
    trace = Trace()
    (trace_ask if options.journey == "ask" else trace_chat)(trace, package)
    functions = trace.functions(package)
    result = {"journey": options.journey, **summarize(functions)}
    names = {f"{module}:{name}": sorted(callers) for (module, name), callers in sorted(functions.items())}
    if options.json:
        print(json.dumps(result | ({"callers": names} if options.list else {}), indent=2))
        return
    if options.list:
        for name, callers in names.items():
            print(name + (f"  <- {callers[0]}" if len(callers) == 1 else ""))
    print("{journey}: {modules} modules, {classes} classes, {functions} functions".format(**result))


if __name__ == "__main__":
    main()
