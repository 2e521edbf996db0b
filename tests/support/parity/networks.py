"""Sets `vision`, `lm` and `e2e`: networks against recorded intermediates, logits and greedy continuations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from keye.cache.sequence import KVCache
from keye.config import KeyeConfig, model_config_from_dict
from keye.media.positions import PreviewLayout, split_grid_rows
from keye.models import vision
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.keye import KeyeModel
from keye.models.load import load_tensors
from tests.support.parity.cases import LOGIT_TOLERANCE, Case, Check, NotApplicable, is_preview
from tests.support.positions import get_rope_index

ARCHITECTURES = {
    "preview": "KeyeForConditionalGeneration",
    "v15": "KeyeVL1_5ForConditionalGeneration",
    "v2": "KeyeVL2ForConditionalGeneration",
    "v2moe": "KeyeVL2MoeForConditionalGeneration",
}
MEDIA_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def build_model(case: Case) -> KeyeModel:
    """The model of a case, filled with its weights; modules that the set leaves out keep what they were made with."""
    kind = case.meta["model_class"]
    if kind not in ARCHITECTURES:
        raise NotApplicable(f"model_class {kind!r} is unknown to this version")
    raw = {**case.meta["config"], "architectures": [ARCHITECTURES[kind]]}
    config = model_config_from_dict(raw | {name: number for number, name in enumerate(MEDIA_TOKENS)})
    # Cases of a decoder alone have the ids of media beyond their small vocabulary, where no token takes them for media.
    config = replace(config, **{name: raw[name] for name in MEDIA_TOKENS})
    model = KeyeModel(config).eval()
    weights = case.weights
    for module in ("visual.", "mlp_AR."):
        if not any(name.startswith(module) for name in weights):
            weights.update({name: t for name, t in model.state_dict().items() if name.startswith(module)})
    load_tensors(model, weights)
    return model


# --------------------------------------------------------------------------------------------------------------------
# vision


def run_vision(case: Case, check: Check) -> None:
    visual, projector = _vision_modules(case)
    chunk = case.meta.get("chunk_env")
    default = vision.PATCHES_PER_CHUNK
    for size in {default, int(chunk) if chunk else default}:
        vision.PATCHES_PER_CHUNK = size
        try:
            _check_vision(case, check, visual, projector, f"chunk {size}: ")
        finally:
            vision.PATCHES_PER_CHUNK = default


def _vision_modules(case: Case) -> tuple[vision.Visual, vision.Projector]:
    """Tower and projector inside a minimal model, so that the product's own loader fills them."""
    text = {
        "vocab_size": 8, "hidden_size": case.meta["text_hidden"], "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 1e4,
        "max_position_embeddings": 8, "rope_scaling": {"mrope_section": [2, 1, 1]}, "image_token_id": 0,
        "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3,
    }  # fmt: skip
    kind = "preview" if is_preview(case.meta) else "v15"
    config = {**text, "architectures": [ARCHITECTURES[kind]], "vision_config": case.meta["config"]}
    model = KeyeModel(model_config_from_dict(config)).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(("visual.", "mlp_AR."))}
    load_tensors(model, {**own, **case.weights})
    return model.visual, model.mlp_AR


def _check_vision(case: Case, check: Check, visual: vision.Visual, projector: vision.Projector, label: str) -> None:
    tower, seen = visual.vision_model, _Recorder()
    seen.watch("out.embeddings", tower.embeddings)
    for i, layer in enumerate(tower.encoder.layers):
        seen.watch(f"out.layer_{i}_attn", layer.self_attn)
        seen.watch(f"out.after_layer_{i}", layer)
    seen.watch("out.post_layernorm", tower.post_layernorm)
    pixels, grids = case.tensors["in.pixel_values"], case.tensors["in.grid_thw"]
    with torch.no_grad(), seen:
        got = {"out.projector": vision.encode_vision(visual, projector, pixels, grids)}
        got |= {name: torch.cat([part.flatten(0, 1) for part in parts]) for name, parts in seen.parts.items()}
        tables = [tower.embeddings.positions(h, w).repeat(t, 1) for t, h, w in grids.tolist()]
        got["out.patch_embedding"] = got["out.embeddings"] - torch.cat(tables)
    for name, want in case.tensors.items():
        if name.startswith("out.") and name not in case.informative:
            check.close(label + name, got[name], want, case.tolerance(), relative=True)


class _Recorder:
    """Keeps the outputs of modules while it is entered."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self._modules: list[tuple[str, nn.Module]] = []
        self._handles: list[Any] = []

    def watch(self, name: str, module: nn.Module) -> None:
        self._modules.append((name, module))

    def __enter__(self) -> _Recorder:
        for name, module in self._modules:
            self._handles.append(module.register_forward_hook(lambda _m, _i, out, n=name: self.parts[n].append(out)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


# --------------------------------------------------------------------------------------------------------------------
# lm and e2e


@dataclass(frozen=True)
class _Rows:
    """The prompts of a case as one ragged batch. Padding is left out; what is recorded there has no meaning.

    `valid` bool [B, L] marks the tokens, `ids` int64 [T] and `positions` int64 [3, T] are those of all rows one after
    the other, `delta` int64 [B] leads from the padded length to the position of the next token.
    """

    valid: Tensor
    ids: Tensor
    positions: Tensor
    delta: Tensor

    @staticmethod
    def of(case: Case) -> _Rows:
        ids = torch.atleast_2d(case.tensors["in.input_ids"])
        mask = case.tensors.get("in.attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().view(ids.shape)
        positions = case.tensors["in.position_ids"].view(3, *ids.shape)[:, valid]
        return _Rows(valid, ids[valid], positions, case.tensors.get("in.rope_delta", torch.zeros(0)).flatten())

    def spans(self, caches: list[KVCache]) -> list[Span]:
        ends = self.valid.sum(1).cumsum(0).tolist()
        return [Span(start, stop, cache) for start, stop, cache in zip([0, *ends], ends, caches, strict=False)]

    def recorded(self, want: Tensor) -> Tensor:
        """A recorded tensor [(B,) L, ...] without padding: [T, ...]."""
        return want.view(*self.valid.shape, -1)[self.valid]


def run_language_model(case: Case, check: Check) -> None:
    """Prefill, then the stored greedy ids one at a time through the caches."""
    model, rows = build_model(case), _Rows.of(case)
    mode: AttentionMode = "sparse" if str(case.meta.get("attention")).startswith("sparse") else "dense"
    spans = rows.spans([KVCache(model.config.text.num_hidden_layers) for _ in rows.valid])
    layers: dict[int, Tensor] = {}
    routers: dict[int, tuple[Tensor, Tensor]] = {}
    step = CachedStep(
        spans, model.config.text, mode=mode,
        on_layer=layers.__setitem__, on_router=lambda i, logits, chosen: routers.__setitem__(i, (logits, chosen)),
    )  # fmt: skip
    with torch.no_grad():
        embeds = _check_embeds(case, check, model, rows)
        logits = model.logits(model(embeds, rows.positions, step))
        _check_observed(case, check, rows, layers, routers)
        check.close("out.logits_prefill", logits, rows.recorded(case.tensors["out.logits_prefill"]), LOGIT_TOLERANCE)
        if "out.greedy_ids" in case.tensors:
            _check_greedy(case, check, model, rows, spans, mode, logits[[span.stop - 1 for span in spans]])
    if case.set_name == "e2e":
        _check_positions(case, check, model.config)


def _check_embeds(case: Case, check: Check, model: KeyeModel, rows: _Rows) -> Tensor:
    """Embeddings of the prompt with visual tokens in place; visual tokens come from pixels where the case has them."""
    kinds = (("image", model.config.image_token_id, "in.pixel_values"),
             ("video", model.config.video_token_id, "in.pixel_values_videos"))  # fmt: skip
    places, tokens, ids = [], [], rows.ids
    for kind, token_id, pixels in kinds:
        want = case.tensors.get(f"out.{kind}_embeds")
        if pixels in case.tensors:
            got = model.encode_vision(case.tensors[pixels], case.tensors[f"in.{kind}_grid_thw"])
            if want is not None:
                check.close(f"out.{kind}_embeds", got, want, case.tolerance())
        elif want is not None:
            got = want
        else:
            continue
        places.append((ids == token_id).nonzero().flatten())
        tokens.append(got)
    recorded = case.tensors.get("out.inputs_embeds")
    wanted = None if recorded is None else rows.recorded(recorded)
    visual = None
    if places:
        visual = torch.cat(tokens)[torch.cat(places).argsort()]
    elif ((ids == kinds[0][1]) | (ids == kinds[1][1])).any():
        assert wanted is not None, "the prompt has placeholders but the case has neither pixels nor embeddings"
        return wanted
    embeds = model.embed(ids, visual)
    if wanted is not None:
        check.close("out.inputs_embeds", embeds, wanted, case.tolerance())
    return embeds


def _check_observed(
    case: Case, check: Check, rows: _Rows, layers: dict[int, Tensor], routers: dict[int, tuple[Tensor, Tensor]]
) -> None:
    for i, hidden in layers.items():
        if (want := case.tensors.get(f"out.prefill_layer_{i}")) is not None:
            check.close(f"out.prefill_layer_{i}", hidden, rows.recorded(want), case.tolerance())
    for i, (logits, chosen) in routers.items():
        if (want := case.tensors.get(f"out.router_logits_{i}")) is not None:
            check.close(f"out.router_logits_{i}", logits, want, case.tolerance())
        if (want := case.tensors.get(f"out.router_topk_ids_{i}")) is not None:
            check.equal(f"out.router_topk_ids_{i}", chosen.sort(-1).values, want.long().sort(-1).values)


def _check_greedy(
    case: Case, check: Check, model: KeyeModel, rows: _Rows, spans: list[Span], mode: AttentionMode, last: Tensor
) -> None:
    """Feeds token k of every row at once, at position L + k + delta of that row; `last` [B, V] is before the first."""
    text, (count, length) = model.config.text, rows.valid.shape
    wanted = case.tensors["out.logits_decode"].view(count, -1, text.vocab_size)
    single = [Span(row, row + 1, span.cache) for row, span in enumerate(spans)]
    for k, tokens in enumerate(torch.atleast_2d(case.tensors["out.greedy_ids"]).unbind(1)):
        check.equal(f"out.greedy_ids[{k}]", last.argmax(-1), tokens)
        step = CachedStep(single, text, mode=mode)
        last = model.logits(model(model.embed(tokens), (length + k + rows.delta).expand(3, -1), step))
        check.close(f"out.logits_decode[{k}]", last, wanted[:, k], LOGIT_TOLERANCE)


def _check_positions(case: Case, check: Check, config: KeyeConfig) -> None:
    """The positions that prompts get from their grids are the recorded ones."""
    grids, preview = {}, None
    for kind, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
        grid = case.tensors.get(f"in.{kind}_grid_thw")
        if grid is not None:
            split = kind == "video" and config.tokens_per_second is None
            grids[token_id] = split_grid_rows(grid) if split else grid.numpy()
            per_frame = case.tensors.get(f"in.{kind}_grid_thw_per_frame")
            if per_frame is not None:
                check.equal(f"in.{kind}_grid_thw_per_frame", grids[token_id], per_frame)
    if config.tokens_per_second is not None:
        seconds = case.tensors.get("in.second_per_grid_ts", torch.zeros(0)).numpy()
        preview = PreviewLayout(
            config.vision_start_token_id, {config.video_token_id: seconds}, config.tokens_per_second
        )
    ids = torch.atleast_2d(case.tensors["in.input_ids"])
    mask = _Rows.of(case).valid
    positions, deltas = get_rope_index(ids, grids, attention_mask=mask, preview=preview)
    check.equal("in.position_ids", positions, case.tensors["in.position_ids"].view(3, *ids.shape))
    check.equal("in.rope_delta", deltas.flatten(), case.tensors["in.rope_delta"].flatten())
