"""Set `gguf`: files that llama.cpp quantised, against its logits and those of the de-quantised weights.

Beside `case-XX.json` lies a file `case-XX-FORMAT.gguf` for each format; a folder may hold some of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from keye.cache.sequence import KVCache
from keye.config import load_model_config
from keye.hub import resolve
from keye.models.attention import CachedStep, Span
from keye.models.load import load_model
from tests.support.parity.cases import LOGIT_TOLERANCE, Case, Check

#: How far llama.cpp, which rounds activations too, may be away: root mean square over the standard deviation.
PEER_BOUND, PEER_BOUNDS = 0.03, {"F32": 1e-3, "F16": 6e-4, "BF16": 4e-3}


def run_gguf(case: Case, check: Check) -> None:
    ids = case.tensors["in.input_ids"].flatten()
    for path in sorted(case.path.parent.glob(f"{case.path.stem}-*.gguf")):
        name = path.stem.removeprefix(f"{case.path.stem}-")
        if name not in case.meta["formats"]:
            continue
        numbers = run_file(path, ids, "none")
        recorded = case.meta["formats"][name].get("llama_vs_dequantised_rms_over_std", 0.0)
        want, peer = (case.tensors.get(f"out.{name}.logits_{kind}") for kind in ("dequantised", "llama"))
        if want is not None:
            check.close(f"{name}: de-quantised", numbers, want.view_as(numbers), LOGIT_TOLERANCE)
            rounded = run_file(path, ids, None)
            bound = max(PEER_BOUND, 1.5 * recorded)  # llama.cpp rounds activations in groups of half the size
            check_distance(check, f"{name}: bits kept, activations rounded", rounded, want, bound)
        if peer is not None:
            bound = max(PEER_BOUNDS.get(name, PEER_BOUND), 1.05 * recorded)
            check_distance(check, f"{name}: llama.cpp", numbers, peer, bound)


def run_file(path: Path, ids: torch.Tensor, quant: str | None) -> torch.Tensor:
    """Logits of every token of a model in float32, whose quantised bits are kept unless `quant` is none."""
    folder = resolve(path)
    model, report = load_model(folder, load_model_config(folder), dtype=torch.float32, quant=quant)
    assert not report.unused, report
    step = CachedStep([Span(0, len(ids), KVCache(model.config.text.num_hidden_layers))], model.config.text)
    with torch.no_grad():
        return model.logits(model(model.embed(ids), torch.arange(len(ids)).expand(3, -1), step))


def check_distance(check: Check, name: str, logits: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """Root mean square of the differences over the standard deviation of what is wanted."""
    distance = ((logits - want.view_as(logits)).square().mean().sqrt() / want.std()).item()
    check.compared += 1
    if not distance <= bound:
        check.fail(name, f"rms / std is {distance:.3g}, above {bound:g}")
