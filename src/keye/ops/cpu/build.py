"""Builds the compiled core for this processor, tries it, and keeps it in a cache.

`python -m keye.ops.cpu.build` does so ahead of the first use and says what is in use. Knows compilers, processors and
files; what the library computes is known to `keye.ops.cpu.backend`, and `keye.ops.cpu.trial` decides whether it
computes right.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final
from warnings import warn

from keye.config import kernel_config
from keye.errors import KeyeError, KeyeWarning

NATIVE: Final = Path(__file__).parents[1] / "native"
SOURCES: Final = ("keye.cpp", "quant.cpp", "threads.cpp", "train.cpp")
_COMMON = (
    "-O3 -std=c++17 -shared -fPIC -pthread -fno-strict-aliasing -fno-math-errno -fvisibility-inlines-hidden"
).split()
_AVX2 = "-mavx2 -mfma -mf16c -mpopcnt".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -DKEYE_AVX512".split()]
_VNNI = ["-mavx512vnni", "-DKEYE_VNNI"]
_BF16 = [*_AVX512, *_VNNI, "-mavx512bf16", "-DKEYE_BF16"]
#: Seconds that the compiler and the trial of a library may take.
_BUILD_LIMIT, _TRIAL_LIMIT = 300, 300


@dataclass(frozen=True)
class Variant:
    """One way to compile the sources: the processor flags (as Linux names them) that it needs, and the compiler's."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_NEEDS_AVX2 = frozenset("avx2 fma f16c popcnt".split())
_NEEDS_AVX512 = _NEEDS_AVX2 | frozenset("avx512f avx512bw avx512dq avx512vl".split())
_NEEDS_VNNI = _NEEDS_AVX512 | {"avx512_vnni"}
_NEEDS_BF16 = _NEEDS_VNNI | {"avx512_bf16"}
#: Best first.
VARIANTS: Final = (
    Variant("amx", _NEEDS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, (*_BF16, "-DKEYE_AMX")),
    Variant("avx512bf16", _NEEDS_BF16, tuple(_BF16)),
    Variant("avx512vnni", _NEEDS_VNNI, (*_AVX512, *_VNNI)),
    Variant("avx512", _NEEDS_AVX512, tuple(_AVX512)),
    Variant("avxvnni", _NEEDS_AVX2 | {"avx_vnni"}, (*_AVX2, "-mavxvnni", "-DKEYE_VNNI")),
    Variant("avx2", _NEEDS_AVX2, tuple(_AVX2)),
)
#: The code of `amx` with its instructions in plain C: slow, for tests on other processors. Only used when named.
EMULATED: Final = Variant("amx-emulated", _NEEDS_BF16, (*_BF16, "-DKEYE_AMX", "-DKEYE_AMX_EMULATE"))


@dataclass(frozen=True)
class Status:
    """What the compiled core can do here: the library and its variant, or None and the reason in one sentence. `note`
    says why no better variant is in use."""

    library: Path | None
    variant: str | None
    note: str


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets of this processor as Linux names them; elsewhere what torch knows of them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        import torch

        level = torch.backends.cpu.get_cpu_capability()
        return {"AVX512": _NEEDS_AVX512, "AVX2": _NEEDS_AVX2}.get(level, frozenset())
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def runnable() -> list[Variant]:
    """Variants whose instructions this processor has, best first; KEYE_CPU_VARIANT leaves one of them."""
    wanted = kernel_config().cpu_variant
    known = {variant.name: variant for variant in (*VARIANTS, EMULATED)}
    if wanted is not None and wanted not in known:
        raise KeyeError(f"KEYE_CPU_VARIANT is {wanted!r}; it must be one of {', '.join(known)}")
    variants = VARIANTS if wanted is None else (known[wanted],)
    return [variant for variant in variants if variant.needs <= processor_flags()]


def compiler() -> list[str] | None:
    """The command of a C++ compiler: CXX, or the first of g++, clang++ and c++ that is there."""
    named = kernel_config().compiler
    if named is not None:
        command = shlex.split(named)
        return command if command and shutil.which(command[0]) else None
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def find(*, build: bool = False) -> Status | None:
    """The best library that was built and tried before, with the failures before it. Where a variant was not tried yet:
    None, or with `build` what becomes of it, which takes seconds."""
    variants, (folder, reason), command = runnable(), _cache_folder(), compiler()
    if folder is None:
        return Status(None, None, reason)
    if not variants:
        note = "this processor has none of the instruction sets that the compiled core needs (AVX2 and newer)"
        return Status(None, None, note)
    if command is None:
        return Status(None, None, "no C++ compiler was found; install g++ or clang++, or name one in CXX")
    failures: list[str] = []
    for variant in variants:
        library = folder / f"keye-{variant.name}-{_fingerprint(command, variant)}.so"
        verdict = _verdict(library)
        if verdict is None:
            if not build:
                return None
            note = f"compiling the kernels for this processor ({variant.name}), once; it takes about half a minute"
            warn(KeyeWarning(note), stacklevel=2)  # now, not among the notes of what needs them
            verdict = _build_and_try(library, command, variant)
        if verdict == "good":
            return Status(library, variant.name, "; ".join(failures))
        failures.append(f"{variant.name}: {verdict}")
    return Status(None, None, "; ".join(failures))


def ready() -> Status:
    """The best library that works here, built where it was not."""
    status = find(build=True)
    assert status is not None
    return status


def _fingerprint(command: list[str], variant: Variant) -> str:
    """Changes with the sources, the flags and the compiler."""
    parts = [source.read_bytes() for source in sorted(NATIVE.iterdir()) if source.suffix in (".h", ".cpp")]
    parts += [" ".join((*_COMMON, *variant.flags)).encode(), _compiler_version(tuple(command)).encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


@cache
def _compiler_version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout


def _verdict(library: Path) -> str | None:
    """What the trial of a library said: `good` or the reason against it. None if it was not tried."""
    try:
        verdict = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(verdict, str) or (verdict == "good" and not library.is_file()):
        return None
    return verdict


def _build_and_try(library: Path, command: list[str], variant: Variant) -> str:
    """Compiles a variant and has a process of its own compare it with the reference. Several processes may do this at
    once: each works under a name of its own, and renaming is atomic."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        verdict = _compile(built, command, variant) or _try(built)
        if verdict == "good":
            built.chmod(0o700)
            built.replace(library)
        note = Path(scratch) / "verdict.json"
        note.write_text(json.dumps({"verdict": verdict}) + "\n", encoding="utf-8")
        note.replace(library.with_suffix(".json"))
    return verdict


def _compile(library: Path, command: list[str], variant: Variant) -> str | None:
    """None, or why the compiler failed."""
    name, sources = f'-DKEYE_VARIANT="{variant.name}"', [str(NATIVE / source) for source in SOURCES]
    full = [*command, *_COMMON, *variant.flags, name, "-o", str(library), *sources]
    try:
        done = subprocess.run(full, capture_output=True, text=True, timeout=_BUILD_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiler {command[0]} could not be run ({error})"
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        return f"the compiler {command[0]} failed: {first[:200]}"
    return None


def _try(library: Path) -> str:
    """`good`, or what went wrong when a process of its own computed a small problem with the library."""
    from keye.version import PACKAGE_FOLDER

    start = "import sys; sys.path.insert(0, sys.argv[1]); from keye.ops.cpu.trial import main; main(sys.argv[2])"
    command = [sys.executable, "-P", "-c", start, str(PACKAGE_FOLDER.parent), str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its trial did not end ({error})"
    if done.returncode < 0:
        return f"its trial was ended by signal {-done.returncode}"
    if done.returncode:
        return f"its trial failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}"
    return "good"


def _cache_folder() -> tuple[Path | None, str]:
    """A folder that only this user can write, since its libraries are run; or None and why there is none."""
    cache = kernel_config().cache
    for folder in (cache, cache / "cpu"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
        except OSError as error:
            return None, f"the cache folder {folder} cannot be made ({error.strerror})"
        if hasattr(os, "getuid") and state.st_uid != os.getuid():
            return None, f"the cache folder {folder} belongs to another user; set XDG_CACHE_HOME"
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None, f"others may write to the cache folder {folder}; make it private with chmod 700"
    return folder, ""


def main() -> int:
    """Builds ahead of the first use; exit code 1 where the reference stays in use."""
    status = ready()
    if status.library is None:
        print(f"the compiled core cannot be used here: {status.note}")
        return 1
    print(f"{status.variant}: {status.library}" + (f" ({status.note})" if status.note else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
