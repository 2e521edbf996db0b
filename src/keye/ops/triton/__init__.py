"""Attention, indexer and expert kernels in Triton. Importing this package imports neither triton nor any kernel."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from keye.ops.triton.backend import TritonBackend

#: The oldest cards that the kernels are written for.
CAPABILITY: Final = (8, 0)


def make() -> TritonBackend | None:
    """The backend, or None where it cannot run: without triton, or without a card, unless Triton's interpreter is on
    (TRITON_INTERPRET=1 when triton is first imported)."""
    if _refusal() is not None:
        return None
    from keye.ops.triton.backend import TritonBackend

    return TritonBackend()


def status() -> str:
    """One sentence: whether the kernels run here, and if not, why."""
    refusal = _refusal()
    if refusal is not None:
        return f"The Triton kernels cannot run here: {refusal}."
    if _interpreted():
        return "The Triton kernels run in Triton's interpreter, which is for tests."
    return f"The Triton kernels run on {torch.cuda.get_device_name()}."


def serves(x: torch.Tensor) -> bool:
    """Whether kernels can read this tensor, where `make` gives a backend. Triton launches on the current device."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if _interpreted():
        return x.device.type == "cpu"
    return x.device.type == "cuda" and x.device.index == torch.cuda.current_device()


def _refusal() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'keye[gpu]')"
    import triton

    if not hasattr(triton, "knobs"):
        return f"triton {triton.__version__} is too old, and they need 3.4 or newer"
    if _interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device was found"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, CAPABILITY))
        return f"{torch.cuda.get_device_name()} has compute capability {have}, and they need {need}"
    return None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
