"""Pictures of high dynamic range made ones of standard range: BT.2100 (PQ or HLG, BT.2020 primaries) to BT.709. Numpy.

The reference white of BT.2408, 203 cd/m2, becomes white. Brighter light, up to 1000 cd/m2, is rolled off by the curve
of BT.2390 (annex 5), applied to the largest colour, so that hues stay. The result is for a display of BT.1886.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Luminances in cd/m2: of white of standard range, and the brightest that is distinguished.
WHITE: Final = 203.0
PEAK: Final = 1000.0
#: BT.2020 luminance of red, green and blue, and the matrix from its primaries to those of BT.709 (BT.2087).
_LUMA: Final = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_TO_709: Final = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
#: PQ (SMPTE ST 2084) and HLG (ARIB STD-B67).
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_HLG_GAMMA: Final = 1.2
#: Entries of the curves, which are looked up.
_STEPS: Final = 4096
#: Pixels that are worked on at once: bounds the memory for frames of any size.
_AT_ONCE: Final = 1 << 18

Floats = NDArray[np.float32]


def to_sdr(frame: NDArray[np.uint8], transfer: str) -> NDArray[np.uint8]:
    """A frame, uint8 RGB [H, W, 3], whose values are coded by `transfer`, "pq" or "hlg", as one of standard range."""
    pixels = frame.reshape(-1, 3)
    done = np.empty_like(pixels)
    for start in range(0, len(pixels), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        light: Floats = _build_decoding(transfer)[pixels[part]]  # as a share of `PEAK`
        if transfer == "hlg":  # of a scene; the display that HLG is meant for makes it steeper
            light *= np.power(light @ _LUMA, np.float32(_HLG_GAMMA - 1))[:, None]
        light *= _build_scale()[_find_steps(light.max(axis=1))][:, None]
        done[part] = _build_encoding()[_find_steps(light @ _TO_709.T)]
    return done.reshape(frame.shape)


def _find_steps(light: Floats) -> NDArray[np.int32]:
    """Places of light of 0 to 1 in curves over its square root, which spreads what is dark."""
    return (np.sqrt(light.clip(0, 1)) * (_STEPS - 1) + 0.5).astype(np.int32)


@cache
def _build_decoding(transfer: str) -> Floats:
    """Light of the 256 values of a coded colour."""
    value = np.arange(256) / 255
    if transfer == "pq":
        return np.minimum(_pq_light(value) / PEAK, 1).astype(np.float32)
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - _C) / _A) + _B) / 12).clip(0, 1).astype(np.float32)


@cache
def _build_scale() -> Floats:
    """What light of each strength is multiplied with, for `WHITE` to be 1."""
    # Over the square root of light, as `_find_steps` has it.
    light = np.maximum((np.arange(_STEPS) / (_STEPS - 1)) ** 2, 1e-9) * PEAK
    value, most = _pq_value(light) / _pq_value(PEAK), _pq_value(WHITE) / _pq_value(PEAK)
    knee = 1.5 * most - 0.5
    t = (value - knee) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    mapped = np.where(value < knee, value, curve) * _pq_value(PEAK)
    return np.asarray(_pq_light(mapped) / WHITE / (light / PEAK)).astype(np.float32)


@cache
def _build_encoding() -> NDArray[np.uint8]:
    """Coded values of light as BT.1886 displays it."""
    return ((np.arange(_STEPS) / (_STEPS - 1)) ** (2 / 2.4) * 255).round().astype(np.uint8)


def _pq_light(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """cd/m2 of PQ values."""
    root = value ** (1 / _M2)
    return np.asarray((np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1) * 10_000)


def _pq_value(light: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """PQ values of cd/m2."""
    power = (np.asarray(light) / 10_000) ** _M1
    return np.asarray(((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2)
