"""The block formats of GGUF against llama.cpp's own quantiser, on the same weights."""

from __future__ import annotations

import pytest

from keye.weights.gguf.dequantize import dequantize
from keye.weights.gguf.kquants import FORMATS
from keye.weights.gguf.types import BY_NAME
from tests.peers import llama_cpp
from tests.weights.test_kquants import COLUMNS, LLAMA_CPP, relative_error, restored, weights

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "shifted", "outliers"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weight_error_is_not_above_that_of_llama_cpp(kind, shape):
    x, form = weights(shape), BY_NAME[kind]
    theirs = llama_cpp.quantize_rows(x, form.number, COLUMNS // form.block * form.nbytes)
    error = relative_error(dequantize(form, theirs.reshape(-1)), x)
    assert relative_error(restored(x, kind), x) <= 1.02 * error
    if shape in LLAMA_CPP:
        assert error == pytest.approx(LLAMA_CPP[shape][kind], rel=1e-3)
