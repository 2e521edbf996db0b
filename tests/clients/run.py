"""Runs unmodified client packages against `keye serve nano`, each at pinned versions in an environment of its own.

    python tests/clients/run.py                     # all of them
    python tests/clients/run.py openai llm          # some
    python tests/clients/run.py --url http://127.0.0.1:8000   # against a server that runs already
    python tests/clients/run.py --install           # makes the environments, and runs nothing
    python tests/clients/run.py --markdown          # the table of docs/clients.md

Environments lie in `.venv-clients` and are made again when their list in `locks` changes; packages of npm lie beside
this file. A client that cannot be installed is skipped, with the reason. Prints one line for each client, and a
closing line as pytest has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-clients"
PYTHON_CLIENTS = (
    "openai", "litellm", "langchain-openai", "llama-index-llms-openai-like", "instructor", "pydantic-ai", "llm",
    "openai-agents", "magentic", "mirascope", "aisuite", "anthropic",
)  # fmt: skip
#: Of npm: the packages, and the script that uses them.
NPM_CLIENTS = {
    "npm openai": ("openai", "use_npm_openai.mjs"),
    "npm ai with @ai-sdk/openai-compatible": ("@ai-sdk/openai-compatible", "use_ai_sdk_openai_compatible.mjs"),
    "npm ai with @ai-sdk/openai": ("@ai-sdk/openai", "use_ai_sdk_openai.mjs"),
    "npm @openai/codex": ("@openai/codex", "use_codex.mjs"),
}
#: The oldest node on which the packages of npm run.
OLDEST_NODE = 20
SECONDS = 420


@dataclass
class Trial:
    """What became of one client. `cases` are outcomes by name, `reason` says why it was skipped."""

    name: str
    version: str
    cases: dict[str, str] = field(default_factory=dict)
    output: str = ""
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", help="names, or parts of them")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = [name for name in (*PYTHON_CLIENTS, *NPM_CLIENTS) if _is_wanted(name, options.clients)]
    if not names:
        parser.error(f"no client has one of these names: {', '.join((*PYTHON_CLIENTS, *NPM_CLIENTS))}")
    problems = {name: install(name) for name in names}
    trials: list[Trial] = []
    if not options.install:
        with server(options.url) as url:
            trials = [try_client(name, problems[name], url) for name in names]
    else:
        trials = [Trial(name, version(name), reason=problems[name]) for name in names if problems[name]]
    if options.markdown:
        print("\n".join(table(trials)))
    counts = {word: sum(_outcome(trial) == word for trial in trials) for word in ("passed", "failed", "skipped")}
    print(f"clients: {', '.join(f'{number} {word}' for word, number in counts.items())}")
    sys.exit(1 if counts["failed"] else 0)


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return not wanted or name in wanted or any(item in name and item not in PYTHON_CLIENTS for item in wanted)


def install(name: str) -> str:
    """Makes the environment of a client unless it is there as it should be; the reason where that fails."""
    if name in NPM_CLIENTS:
        return _install_npm()
    lock, folder = HERE / "locks" / f"{name}.txt", ENVIRONMENTS / name
    stamp, wanted = folder / ".ready", f"{sys.version}\n{lock.read_text()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    # One pip serves all environments: making a pip for each takes longer than most of the packages.
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-deps",
           "--no-compile", "--disable-pip-version-check", "--requirement", str(lock)]  # fmt: skip
    problem = _run([sys.executable, "-m", "venv", "--without-pip", str(folder)]) or _run(pip)
    if not problem:
        stamp.write_text(wanted)
    return problem


def _install_npm() -> str:
    """The packages of npm, all in one folder; once."""
    modules = HERE / "node_modules"
    wanted = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
    stamp = modules / ".keye-ready"
    if stamp.is_file() and stamp.read_text() == wanted:
        return ""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node and npm are not installed"
    result = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    if int(result.lstrip("v").partition(".")[0] or 0) < OLDEST_NODE:
        return f"node {result} is older than {OLDEST_NODE}"
    problem = _run(["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(HERE)])
    if not problem:
        stamp.write_text(wanted)
    return problem


def _run(command: list[str]) -> str:
    """Runs a command; the end of what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stderr.strip() or done.stdout.strip() or "it failed without a word").splitlines()
    return "" if done.returncode == 0 else lines[-1][:300]


def version(name: str) -> str:
    """The pinned version of a client."""
    if name in NPM_CLIENTS:
        result = json.loads((HERE / "package.json").read_text())["dependencies"][NPM_CLIENTS[name][0]]
        return str(result)
    project = "pydantic-ai-slim" if name == "pydantic-ai" else name
    lines = (HERE / "locks" / f"{name}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.lower().startswith(f"{project}=="))


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The address of a server: the given one, or one that lives as long as the trials."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "keye", "serve", "nano", "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        assert process.stdout is not None
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("address")), None)
            if address is None:
                log.seek(0)
                sys.exit(f"keye serve did not start: {log.read()[-2000:]}")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def try_client(name: str, problem: str, url: str) -> Trial:
    """Runs the script of a client."""
    trial = Trial(name, version(name), reason=problem)
    if not problem:
        trial.output = _output(name, url)
        for line in trial.output.splitlines():
            if line.startswith('{"case"'):
                events = json.loads(line)
                trial.cases[events["case"]] = events["outcome"]
    outcome = _outcome(trial)
    events = problem or ", ".join(case if how == "passed" else f"{case} FAILED" for case, how in trial.cases.items())
    print(f"{outcome} {name} {trial.version}: {events}", flush=True)
    if outcome == "failed":
        print(re.sub(r"^", "    ", trial.output[-6000:], flags=re.M), flush=True)
    return trial


def _output(name: str, url: str) -> str:
    """All that the script of a client writes. Its closing line is `N passed, N failed`."""
    if name in NPM_CLIENTS:
        command = ["node", str(HERE / NPM_CLIENTS[name][1])]
    else:
        command = [str(ENVIRONMENTS / name / "bin/python"), str(HERE / f"use_{name.replace('-', '_')}.py")]
    # Nothing of the user's own: keys, settings of clients, paths of Python.
    stored = {
        key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")
    }
    environment = {**stored, "KEYE_URL": url, "NO_PROXY": "*"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        return f"{_text(error.stdout)}{_text(error.stderr)}\nit took longer than {SECONDS} s"
    return done.stderr + done.stdout


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _outcome(trial: Trial) -> str:
    if trial.reason:
        return "skipped"
    ended = re.search(r"^(\d+) passed, 0 failed$", trial.output, flags=re.M)
    return "passed" if ended and int(ended[1]) == len(trial.cases) > 0 else "failed"


def table(trials: list[Trial]) -> Iterator[str]:
    """What worked, as a table."""
    columns = ("chat", "stream", "image", "video", "tools", "structured", "errors")
    yield f"| client | version | {' | '.join(columns)} | further |"
    yield "|---" * (len(columns) + 3) + "|"
    for trial in trials:
        cells = [{"passed": "yes", "failed": "FAILED"}.get(trial.cases.get(item, ""), "-") for item in columns]
        further = ", ".join(item for item in trial.cases if item not in columns)
        yield f"| {trial.name} | {trial.version} | {' | '.join(cells)} | {further} |"


if __name__ == "__main__":
    main()
