"""The block formats of GGUF against llama.cpp's own quantiser, on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keye.weights.gguf.kquants import FORMATS, quantize
from tests.peers import llama_cpp

pytestmark = pytest.mark.peer
ROWS, COLUMNS = 48, 1024


def weights(shape: str) -> np.ndarray:
    """float32 [ROWS, COLUMNS] of one kind of distribution."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, COLUMNS))
    if shape == "heavy tails":
        x = random.standard_t(5, (ROWS, COLUMNS))
    elif shape == "shifted":
        x += 1.5
    elif shape == "outliers":
        x[:, ::97] *= 20
    return (0.02 * x).astype(np.float32)


def relative_error(values: np.ndarray, wanted: np.ndarray) -> float:
    difference = values.astype(np.float64) - wanted
    return float(np.sqrt(np.square(difference).sum() / np.square(wanted.astype(np.float64)).sum()))


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "shifted", "outliers"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weight_error_is_not_above_that_of_llama_cpp(gguf, kind, shape):
    x, form = weights(shape), FORMATS[kind]
    type_number = gguf.GGMLQuantizationType[kind]
    theirs = llama_cpp.quantize_rows(x, type_number.value, COLUMNS // form.numbers * form.nbytes)
    ours = quantize(torch.from_numpy(x), kind).numpy()
    errors = [relative_error(gguf.dequantize(data, type_number), x) for data in (ours, theirs)]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_and_tiny_numbers_stay_what_they_are(gguf, kind):
    x = torch.zeros(3, 512)
    x[1] = 1e-12
    x[2, :300] = 0.5
    values = gguf.dequantize(quantize(x, kind).numpy(), gguf.GGMLQuantizationType[kind])
    assert np.abs(values - x.numpy()).max() < 0.04
    assert (values[0] == 0).all()
