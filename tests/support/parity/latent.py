"""Set `latent`: the decoder of Keye-VL-671B, loaded from files in the official layout, float8 ones among them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.config import model_config_from_dict
from keye.models.attention import CachedStep, Span
from keye.models.keye import KeyeModel
from keye.models.load import load_model
from keye.models.moe import MoE
from keye.ops.latent import Form
from tests.support.parity.cases import LOGIT_TOLERANCE, Case, Check


def build_model(case: Case) -> KeyeModel:
    """The model of a case in float32, read from a checkpoint folder as a user's would be."""
    raw = {**case.meta["config"], "vision_config": None}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        save_file(case.weights, Path(folder) / "model.safetensors")
        model, report = load_model(Path(folder), model_config_from_dict(raw), dtype=torch.float32)
    drafts = (f"model.layers.{raw['num_hidden_layers']}.",)
    assert all(name.startswith(drafts) for name in report.ignored) and not report.unused
    return model


def run_latent(case: Case, check: Check) -> None:
    """Prefill with layers and routing, then the stored greedy ids one at a time through the cache; with latents
    attended to as they are, and with keys and values expanded from them."""
    model = build_model(case)
    forms: tuple[Form, ...] = ("absorbed", "expanded")
    for form in forms:
        _check_form(case, check, model, form)


def _check_form(case: Case, check: Check, model: KeyeModel, form: Form) -> None:
    ids, cache = case.tensors["in.input_ids"].flatten(), KVCache(model.config.text.num_hidden_layers)
    layers: dict[int, Tensor] = {}
    routers: dict[int, tuple[Tensor, Tensor]] = {}
    step = CachedStep(
        [Span(0, len(ids), cache)], model.config.text,
        on_layer=layers.__setitem__, on_router=lambda i, logits, chosen: routers.__setitem__(i, (logits, chosen)),
    )  # fmt: skip
    step.latent_form = form
    with torch.no_grad():
        logits = model.logits(model(model.embed(ids), torch.arange(len(ids)).expand(3, -1), step))
        for name, want in case.tensors.items():
            if name.startswith("out.prefill_layer_"):
                check.close(name, layers[int(name.rpartition("_")[2])], want, case.tolerance())
            elif name.startswith("out.router_logits_"):
                _check_router(case, check, model, int(name.rpartition("_")[2]), routers)
        check.close("out.logits_prefill", logits, case.tensors["out.logits_prefill"], LOGIT_TOLERANCE)
        last = logits[-1]
        for k, token in enumerate(case.tensors["out.greedy_ids"].flatten().tolist()):
            check.equal(f"out.greedy_ids[{k}]", int(last.argmax()), token)
            step = CachedStep([Span(0, 1, cache)], model.config.text)
            step.latent_form = form
            position = torch.full((3, 1), len(ids) + k)
            last = model.logits(model(model.embed(torch.tensor([token])), position, step))[0]
            check.close(f"out.logits_decode[{k}]", last, case.tensors["out.logits_decode"][k], LOGIT_TOLERANCE)


def _check_router(
    case: Case, check: Check, model: KeyeModel, layer: int, routers: dict[int, tuple[Tensor, Tensor]]
) -> None:
    moe, (logits, chosen) = model.model.layers[layer].mlp, routers[layer]
    assert isinstance(moe, MoE)
    weights, again = moe.gate.choose(logits)
    ids, order = chosen.sort(dim=1)
    check.equal(f"layer {layer} chooses twice", again, chosen)
    check.close(f"out.router_logits_{layer}", logits, case.tensors[f"out.router_logits_{layer}"], case.tolerance())
    check.equal(f"out.router_topk_ids_{layer}", ids, case.tensors[f"out.router_topk_ids_{layer}"])
    wanted = case.tensors[f"out.router_topk_weights_{layer}"]
    check.close(f"out.router_topk_weights_{layer}", weights.gather(1, order), wanted, case.tolerance())
