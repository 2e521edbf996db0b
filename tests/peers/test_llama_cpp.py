"""The peer itself: llama.cpp repeats the logits that it once gave."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.peers import llama_cpp

pytestmark = pytest.mark.peer
GOLDEN = Path(os.environ.get("KEYE_GOLDEN") or Path(__file__).parents[1] / "golden") / "gguf"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference vectors of GGUF files")
@pytest.mark.parametrize("case", ["case-00-Q4_K_M", "case-01-Q4_K_M"])
def test_llama_cpp_repeats_its_reference_logits(case):
    values = load_file(GOLDEN / f"{case[:7]}.safetensors")
    ours = llama_cpp.logits(GOLDEN / f"{case}.gguf", values["in.input_ids"].tolist())
    np.testing.assert_allclose(ours, values[f"out.{case[8:]}.logits_llama"], atol=2e-2)  # other processors round on
