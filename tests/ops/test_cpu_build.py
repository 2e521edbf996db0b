"""How the compiled core comes to be, and what happens where it cannot."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from keye.errors import KeyeError, KeyeWarning
from keye.ops.backend import Stretch
from keye.ops.cpu import backend as cpu
from keye.ops.cpu import build as cpu_build
from keye.ops.cpu import trial as cpu_trial
from keye.ops.cpu.backend import CpuBackend
from keye.ops.cpu.build import Status, Variant
from keye.ops.cpu.trial import Problem
from keye.ops.registry import Backends


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice of the person who runs the tests."""
    for name in ("KEYE_KERNELS", "KEYE_CPU_VARIANT", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder without libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "keye" / "cpu"


@pytest.fixture
def good_library() -> Status:
    """The library in the user's cache."""
    if not cpu_build.runnable() or cpu_build.compiler() is None:
        pytest.skip("the compiled core cannot be built here")
    return cpu_build.ready()


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    """Names a compiler in CXX whose version is that of the real one; otherwise `script` is run, with the output file in
    $out. Returns the log of its calls, a line each."""
    compiler = cpu_build.compiler()
    if not cpu_build.runnable() or compiler is None:
        pytest.skip("the compiled core cannot be built here")
    program, log = folder / "compiler", folder / "calls"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {shlex.join(compiler)} --version;; esac\necho "$@" >> {log}\n'
        f'real="{shlex.join(compiler)}"\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n{script}\n'
    )
    program.chmod(0o700)
    log.touch()
    monkeypatch.setenv("CXX", str(program))
    return log


def test_without_a_compiler_the_reference_is_used(empty_cache, monkeypatch, tmp_path):
    if not cpu_build.runnable():
        pytest.skip("no variant runs on this processor")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_build.ready() == Status(
        None, None, "no C++ compiler was found; install g++ or clang++, or name one in CXX"
    )
    assert cpu.make() is None
    backends = Backends()
    assert backends.of(torch.device("cpu")).name == "reference"
    assert cpu.status().startswith("reference, plain torch: no C++ compiler")
    with pytest.raises(KeyeError, match="cpu kernels cannot run here"):
        backends.choose("cpu")


def test_without_the_instruction_sets_the_reference_is_used(empty_cache, monkeypatch):
    monkeypatch.setattr(cpu_build, "processor_flags", lambda: frozenset(["sse2"]))
    assert "instruction sets" in cpu_build.ready().note


def test_a_compiler_that_fails_is_named(empty_cache, monkeypatch):
    if not cpu_build.runnable():
        pytest.skip("no variant runs on this processor")
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(KeyeWarning, match="compiling the kernels for this processor"):
        status = cpu_build.ready()
    assert status.library is None and "the compiler false failed" in status.note
    assert list(empty_cache.glob("*.so")) == []


def test_a_library_that_crashes_gives_way_to_the_next_variant(good_library, empty_cache, monkeypatch, tmp_path):
    """The best variant ends its trial with a signal; the next one is a library that works."""
    source = tmp_path / "crash.cpp"
    source.write_text("#include <cstdlib>\n__attribute__((constructor)) static void fail() { std::abort(); }\n")
    crash, good = f'$real -shared -fPIC -o "$out" {source}', f'cp {good_library.library} "$out"'
    log = use_compiler(monkeypatch, tmp_path, f"if grep -q -- -DPLAIN {tmp_path}/calls; then {good}; else {crash}; fi")
    best = cpu_build.runnable()[0]
    monkeypatch.setattr(cpu_build, "runnable", lambda: [best, Variant("plain", frozenset(), ("-DPLAIN",))])
    status = cpu_build.ready()
    assert status.variant == "plain"
    assert status.note == f"{best.name}: its trial was ended by signal 6"
    assert len(list(empty_cache.glob("*.so"))) == 1 and len(log.read_text().splitlines()) == 2


def test_the_trial_finds_wrong_numbers(good_library, monkeypatch):
    backend = CpuBackend(good_library.library)
    cpu_trial.check(backend, torch.float32, None)
    monkeypatch.setattr(CpuBackend, "dense", lambda self, q, stretches, out: out.zero_())
    with pytest.raises(AssertionError, match="dense attention differs from the reference by"):
        cpu_trial.check(backend, torch.float32, None)


def test_the_verdict_is_kept(good_library, monkeypatch, tmp_path):
    log = use_compiler(monkeypatch, tmp_path, "exit 1")
    assert cpu_build.ready() == good_library == cpu_build.find()
    assert not log.read_text(), "built again"
    assert json.loads(good_library.library.with_suffix(".json").read_text()) == {"verdict": "good"}


def test_a_cache_that_others_can_write_is_not_trusted(empty_cache):
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    assert "others may write" in cpu_build.ready().note


def test_variables_choose_kernels_and_variant(monkeypatch):
    monkeypatch.setenv("KEYE_KERNELS", "reference")
    assert Backends().of(torch.device("cpu")).name == "reference"
    monkeypatch.setenv("KEYE_KERNELS", "fast")
    with pytest.raises(KeyeError, match="'fast' are not known"):
        Backends().of(torch.device("cpu"))
    monkeypatch.setenv("KEYE_CPU_VARIANT", "sse")
    with pytest.raises(KeyeError, match="KEYE_CPU_VARIANT is 'sse'"):
        cpu_build.runnable()


def test_a_library_to_be_built_is_searched_for_once(empty_cache, monkeypatch):
    searches = []
    monkeypatch.setattr(cpu_build, "find", lambda: searches.append(1))
    backend, step = CpuBackend(), one_query(100)
    assert not any(backend.takes(*step) for _ in range(3))
    assert len(searches) == 1


def test_nothing_is_built_for_short_contexts(empty_cache, monkeypatch, tmp_path):
    log = use_compiler(monkeypatch, tmp_path, "exit 1")
    backend = cpu.make()
    assert backend is not None
    assert not backend.takes(*one_query(cpu.BUILD_ABOVE)) and not log.read_text()
    assert not backend.takes(*one_query(cpu.BUILD_ABOVE + 1)) and log.read_text()


def one_query(length: int) -> tuple[torch.Tensor, Stretch]:
    """The last of `length` tokens, which the compiled core can take where there is one."""
    problem = Problem(length, 2, 32, 32, torch.float32, torch.Generator().manual_seed(0))
    return torch.zeros(1, 4, 32), problem.stretch(0, 1)
