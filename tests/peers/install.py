"""Installs the peers that GGUF files are compared with, in a folder of its own: `make peers`.

    python tests/peers/install.py     # exit code 1 and a sentence where they cannot be had here

llama.cpp comes prebuilt in the package `@node-llama-cpp/linux-x64` of npm (11 MB; MIT, as llama.cpp itself is), its
format reference as the package `gguf` of PyPI (MIT). Both have pinned versions; the archive of npm is checked against
its published checksum, the wheel by pip. They are used by tests and benchmarks and are no part of what keye installs.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Where the peers lie: `lib` holds llama.cpp, `python` the package gguf, `LICENSE-*` their licences.
FOLDER = Path(os.environ.get("KEYE_PEERS", ROOT / ".venv-peers"))
PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
SHA512 = "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg=="
GGUF = "gguf==0.19.0"
GGUF_HASH = "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
_STAMP = f"{PACKAGE} {VERSION} {GGUF} {sys.version}"
_SECONDS = 300


def problem() -> str:
    """Installs what is missing; the reason where it cannot be had here, or nothing."""
    stamp = FOLDER / ".ready"
    if stamp.is_file() and stamp.read_text() == _STAMP:
        return ""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"{PACKAGE} is for Linux on x86-64"
    if shutil.which("npm") is None:
        return "npm is not installed"
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "lib").mkdir(parents=True)
    reason = _install_llama_cpp() or _install_gguf()
    if not reason:
        stamp.write_text(_STAMP)
    return reason


def _install_llama_cpp() -> str:
    with tempfile.TemporaryDirectory(prefix="keye-peers-") as scratch:
        reason = _run(["npm", "pack", "--loglevel=error", f"{PACKAGE}@{VERSION}", "--pack-destination", scratch])
        if reason:
            return reason
        [archive] = Path(scratch).glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != SHA512:
            return f"{PACKAGE} {VERSION} has the checksum {digest}, not the one that is pinned"
        with tarfile.open(archive) as package:
            package.extractall(scratch, filter="data")
        inside = Path(scratch) / "package"
        for library in (inside / "bins/linux-x64").glob("lib*.so"):
            shutil.copy(library, FOLDER / "lib")
        shutil.copy(inside / "LICENSE", FOLDER / "LICENSE-node-llama-cpp")
    return ""


def _install_gguf() -> str:
    lock = f"{GGUF} --hash=sha256:{GGUF_HASH}\n"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(lock)
        file.flush()
        return _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check",
                     "--target", str(FOLDER / "python"), "--require-hashes", "--requirement", file.name])  # fmt: skip


def _run(command: list[str]) -> str:
    """Nothing, or the first line of what a command that failed said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    return "" if done.returncode == 0 else f"{' '.join(command[:3])} failed: {lines[0]}"


if __name__ == "__main__":
    if reason := problem():
        sys.exit(f"the peers cannot be installed here: {reason}")
    print(f"llama.cpp and gguf in {FOLDER}")
