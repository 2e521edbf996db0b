"""Every recorded case of every known set; what a case is, its own json says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.parity.cases import Case, Check, NotApplicable
from tests.support.parity.dsa import run_dsa
from tests.support.parity.gguf import run_gguf
from tests.support.parity.latent import run_latent
from tests.support.parity.networks import run_language_model, run_vision
from tests.support.parity.preprocess import run_preprocess
from tests.support.parity.processor import run_processor
from tests.support.parity.rope import run_rope

SETS: dict[str, Callable[[Case, Check], None]] = {
    "preprocess": run_preprocess,
    "processor": run_processor,
    "rope": run_rope,
    "vision": run_vision,
    "lm": run_language_model,
    "e2e": run_language_model,
    "dsa": run_dsa,
    "gguf": run_gguf,
    "latent": run_latent,
}


def test_case(case: Case) -> None:
    check = Check()
    if case.set_name not in SETS:
        pytest.skip(f"set {case.set_name!r} is not implemented yet")
    if case.is_informative:
        pytest.skip(f"informative, no reference: {case.meta['informative']}"[:200])
    try:
        SETS[case.set_name](case, check)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    check.finish()
