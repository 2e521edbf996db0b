"""Set `gguf`: files that llama.cpp quantised, against its logits and those of the de-quantised weights.

Beside `case-XX.json` lies a file `case-XX-FORMAT.gguf` for each format; a folder may hold some of them.
"""

from __future__ import annotations

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
        folder = resolve(path)
        model, report = load_model(folder, load_model_config(folder), dtype=torch.float32, quant="none")
        check.equal(f"{name}: unused tensors", report.unused, ())
        span = Span(0, len(ids), KVCache(model.config.text.num_hidden_layers))
        positions = torch.arange(len(ids)).expand(3, -1)
        with torch.no_grad():
            logits = model.logits(model(model.embed(ids), positions, CachedStep([span], model.config.text)))
        want = case.tensors.get(f"out.{name}.logits_dequantised")
        if want is not None:
            check.close(f"{name}: de-quantised", logits, want.view_as(logits), LOGIT_TOLERANCE)
        peer = case.tensors.get(f"out.{name}.logits_llama")
        if peer is not None:
            distance = ((logits - peer.view_as(logits)).square().mean().sqrt() / peer.std()).item()
            recorded = case.meta["formats"][name].get("llama_vs_dequantised_rms_over_std", 0.0)
            bound = max(PEER_BOUNDS.get(name, PEER_BOUND), 1.05 * recorded)
            if not distance <= bound:
                check.fail(f"{name}: llama.cpp", f"rms / std is {distance:.3g}, above {bound:g}")
