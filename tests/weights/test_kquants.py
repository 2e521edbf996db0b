"""Block formats of GGUF: how near they come to the weights, with llama.cpp's own errors as the measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keye.weights.gguf.dequantize import dequantize
from keye.weights.gguf.kquants import FORMATS, quantize
from keye.weights.gguf.types import BY_NAME

ROWS, COLUMNS = 48, 1024
#: Relative errors of llama.cpp v0.5.0 for `weights()`, as tests/peers/test_kquants.py measures them.
LLAMA_CPP = {
    "normal": {"Q8_0": 0.005364, "Q4_0": 0.086204, "Q5_0": 0.042793, "Q5_1": 0.038069, "Q3_K": 0.151916,
               "Q4_K": 0.071381, "Q5_K": 0.036261, "Q6_K": 0.017823},
    "heavy tails": {"Q8_0": 0.006747, "Q4_0": 0.107045, "Q5_0": 0.053668, "Q5_1": 0.043285, "Q3_K": 0.176425,
                    "Q4_K": 0.082709, "Q5_K": 0.04201, "Q6_K": 0.021449},
}  # fmt: skip


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
    difference = values.reshape(-1).astype(np.float64) - wanted.reshape(-1)
    return float(np.sqrt(np.square(difference).sum() / np.square(wanted.astype(np.float64)).sum()))


def restored(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers after quantising: float32 of the same shape."""
    data = quantize(torch.from_numpy(x), kind)
    assert data.shape == (len(x), x.shape[1] // BY_NAME[kind].block * BY_NAME[kind].nbytes)
    return dequantize(BY_NAME[kind], data.numpy().reshape(-1)).reshape(x.shape)


@pytest.mark.parametrize("shape", LLAMA_CPP)
@pytest.mark.parametrize("kind", FORMATS)
def test_weight_error_is_not_above_that_of_llama_cpp(kind, shape):
    x = weights(shape)
    assert relative_error(restored(x, kind), x) <= 1.02 * LLAMA_CPP[shape][kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_and_tiny_numbers_stay_what_they_are(kind):
    x = np.zeros((3, 512), np.float32)
    x[1] = 1e-12
    x[2, :300] = 0.5
    values = restored(x, kind)
    assert np.abs(values - x).max() < 0.04
    assert (values[0] == 0).all()


def test_numbers_of_a_format_are_kept():
    x = restored(weights("normal"), "Q8_0")
    np.testing.assert_array_equal(restored(x, "Q8_0"), x)
