"""Helper losses of language training: supervision that FrameForge's exact knowledge gives for free.

Four of them, each with a weight in the stage: tokens name the times they belong to (`time_binding`), attention heads
look where the evidence lies (`pointing`), the token after a frame says what it shows and what changed (`events`),
questions know where their object is, how it moves, how big it is and whether it comes back (`tracking`). Their heads
are thrown away; inference knows nothing of them.

Legend: B clips, F frames, d model width, n pointers of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.data.frameforge.labels import BACKGROUND_IDS
from keye.data.frameforge.words import COLORS, SHAPES
from keye.models.keye import KeyeModel
from keye.train.packed import AttentionHint, TreeStep
from keye.train.recipes.nano.batches import PackedBatch
from keye.train.recipes.nano.config import NanoTable
from keye.train.recipes.nano.evidence import TRAINED_PAIRS, UNNAMED, Finding, FindingKind, Pointer, PointerKind

#: Which head of which layer (as a share of all layers) each kind of pointer is shown to. The first come early: answers
#: build on what names and times have found.
HINTED: dict[PointerKind, tuple[float, int]] = {
    "time": (0.4, 0), "first": (0.5, 0), "last": (0.5, 2), "start": (0.67, 0), "end": (0.67, 2), "letter": (0.5, 3),
    "seen": (0.5, 1), "place": (0.4, 1), "again": (0.5, 3), "before": (0.4, 3), "origin": (0.4, 2),
}  # fmt: skip
#: Layers (shares) after which the heads read what a frame shows, what changed, what a time in a question shows, and
#: which of two names comes first.
SEEN_DEPTH, CHANGE_DEPTH, LOOKUP_DEPTH, COMPARE_DEPTH = 0.17, 0.34, 0.5, 0.67
#: Rank of the product of colour and shape vectors that a pair's logit is.
RANK = 16
RARE = 3.0
#: Frame numbers are learnt in units of this many frames; their squared errors count as much as this many pairs.
FRAME_UNIT, FRAME_WEIGHT = 16.0, 10.0
COMPARE_WEIGHT = 4.0
#: Which directions of hidden states hold which findings, whether the background changes, and its colour.
DIRECTIONS: dict[FindingKind | Literal["cut", "background"], slice] = {
    "place": slice(0, 2), "size": slice(2, 3), "times": slice(3, 4), "direction": slice(4, 6), "cut": slice(6, 7),
    "background": slice(7, 7 + len(BACKGROUND_IDS)),
}  # fmt: skip
FINDINGS: tuple[FindingKind, ...] = ("place", "direction", "size", "times")
#: How far a finding of 1 moves a hidden state whose root mean square is 1.
REACH = 1.0

Record = Callable[[str, float, float], None]


class PairHead(nn.Module):
    """Logits of `kinds` properties of every (colour, shape): inner products of a colour's and a shape's vector, so that
    a pair never trained on is read like the others. [n, d] -> [n, kinds, 8, 5]."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.project = nn.Linear(width, kinds * (len(COLORS) + len(SHAPES)) * RANK)
        self.bias = nn.Parameter(torch.full((kinds, 1, 1), -3.0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.rms_norm(x.float(), x.shape[-1:])).view(-1, self.kinds, len(COLORS) + len(SHAPES), RANK)
        color, shape = out.split((len(COLORS), len(SHAPES)), dim=2)
        return color @ shape.mT / RANK**0.5 + self.bias


class Helpers(nn.Module):
    """Heads and losses of one language stage; `record(name, sum, count)` takes figures for the log."""

    _trained: Tensor
    _directions: Tensor

    def __init__(self, config: NanoTable, model: KeyeModel, record: Record) -> None:
        super().__init__()
        self.config, self.record = config, record
        width, self.layers = model.config.text.hidden_size, model.config.text.num_hidden_layers
        self.query_heads = model.config.text.num_attention_heads
        if config.time_binding:
            self.binding = nn.Linear(width, 4 * width, bias=False)
        if config.events:
            self.seen, self.changed, self.looked_up = PairHead(width, 1), PairHead(width, 2), PairHead(width, 1)
            self.scene = nn.Linear(width, len(BACKGROUND_IDS) + 1)
            self.text = nn.Linear(width, 2)
            self.so_far = PairHead(width, 1)
            self.number, self.edges, self.later = nn.Linear(width, 1), nn.Linear(width, 2), nn.Linear(width, 1)
        if config.tracking:
            # Drawn once for all stages and not learnt: what is known must be written where the next layers can read it,
            # which a head that learns to read small signals would not ask for.
            drawn = torch.randn(DIRECTIONS["background"].stop, width, generator=torch.Generator().manual_seed(0))
            self.register_buffer("_directions", F.normalize(drawn, dim=1) / REACH, persistent=False)
        self.register_buffer("_trained", torch.from_numpy(TRAINED_PAIRS), persistent=False)

    def _layer(self, depth: float) -> int:
        return min(int(depth * self.layers), self.layers - 1)

    @property
    def watch(self) -> tuple[int, ...]:
        """Layers whose output the losses read."""
        return tuple(self._layer(depth) for depth in (SEEN_DEPTH, CHANGE_DEPTH, LOOKUP_DEPTH, COMPARE_DEPTH))

    def hints(self, batch: PackedBatch[Tensor]) -> list[AttentionHint]:
        """Where heads should look in this batch."""
        if not self.config.pointing:
            return []
        hints, trunk, device = [], batch.layout.length, batch.labels.device
        for kind, (depth, head) in HINTED.items():
            if not (pointers := _of_kind(batch, kind)):
                continue
            targets = np.zeros((len(pointers), trunk), bool)
            for row, pointer in zip(targets, pointers, strict=True):
                for start, stop in pointer.spans:
                    row[start:stop] = True
            rows, queries = _rows_and_places(pointers, trunk, device)
            looks_at = torch.from_numpy(targets).to(device)
            first = rows * (trunk + batch.tail_ids.shape[1])
            layer, head = self._layer(depth), head % self.query_heads
            hints.append(AttentionHint(kind, layer, first + queries, first, looks_at, head))
        return hints

    def loss(self, model: KeyeModel, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """The weighted sum of the losses, after the forward pass that `step` watched."""
        total = torch.zeros((), device=model.device)
        if self.config.time_binding and batch.time_ids.shape[1]:
            total = total + self.config.time_binding * self._bind_times(model, batch, step)
        for name, hint in step.hint_losses.items():
            self.record(f"looks at {name}", float((-hint.detach()).exp()), 1.0)
            total = total + self.config.pointing * hint
        if self.config.events:
            total = total + self.config.events * self._events(batch, step)
        if self.config.tracking:
            total = total + self.config.tracking * self._track(batch, step)
        return total

    def _hidden(self, step: TreeStep, depth: float, batch: PackedBatch[Tensor]) -> Tensor:
        """[B, N, d] after the layer at `depth`."""
        hidden = step.hidden[self._layer(depth)]
        return hidden.view(batch.trunk_ids.shape[0], -1, hidden.shape[-1])

    def _bind_times(self, model: KeyeModel, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """Two random visual tokens of each frame and the last token of a time in a question name their time; the token
        after a frame names its time and that of the frame before it."""
        layout, frames = batch.layout, range(batch.layout.frames)
        early = self._hidden(step, SEEN_DEPTH, batch)
        first = torch.tensor([layout.visual(frame) for frame in frames])
        # Drawn on the processor, so that every device draws the same.
        picked = (first[:, None] + torch.randint(layout.cells, (layout.frames, 2))).to(early.device)
        times = batch.time_ids  # [B, F, 2]
        own = times.unsqueeze(2).expand(-1, -1, 2, -1)
        loss = self._name_time(model, early[:, picked.flatten()].flatten(0, 1), own.reshape(-1, 2), 0, "time of frame")
        after = self._hidden(step, CHANGE_DEPTH, batch)[:, [layout.after(frame) for frame in frames]]
        loss = loss + self._name_time(model, after.flatten(0, 1), times.flatten(0, 1), 0, "time after frame")
        if layout.frames > 1:
            before = after[:, 1:].flatten(0, 1), times[:, :-1].flatten(0, 1)
            loss = loss + self._name_time(model, *before, 1, "time of frame before")
        if pointers := _of_kind(batch, "time"):
            rows, places = _rows_and_places(pointers, layout.length, early.device)
            target = times[rows, torch.tensor([pointer.frame for pointer in pointers], device=early.device)]
            loss = loss + self._name_time(model, early[rows, places], target, 0, "time in question")
        return loss

    def _name_time(self, model: KeyeModel, x: Tensor, target: Tensor, which: int, name: str) -> Tensor:
        """`x` [n, d] predicts the two tokens of a time, `target` [n, 2], with the head `which`."""
        width = x.shape[-1]
        weight = self.binding.weight[2 * which * width : 2 * (which + 1) * width].to(x.dtype)
        both = F.linear(F.rms_norm(x, (width,)), weight).unflatten(-1, (2, width))
        logits = model.logits(both).flatten(0, 1)
        self.record(name, float((logits.argmax(-1) == target.flatten()).float().mean()), 1.0)
        return F.cross_entropy(logits, target.flatten())

    def _events(self, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """What the token after each frame knows of it, and what the time in a question knows of its frame."""
        events, after = batch.events, [batch.layout.after(frame) for frame in range(batch.layout.frames)]
        pairs = events.pairs.flatten(0, 1)  # [B F, 3, 8, 5]
        early = self._hidden(step, SEEN_DEPTH, batch)[:, after].flatten(0, 1)
        late = self._hidden(step, CHANGE_DEPTH, batch)[:, after].flatten(0, 1)
        loss = self.pair_loss(self.seen(early), pairs[:, :1], "seen")
        loss = loss + self.pair_loss(self.changed(late), pairs[:, 1:], "changed")
        background, cut = events.background.flatten(), events.cut.flatten().float()
        scene = self.scene(F.rms_norm(late.float(), late.shape[-1:]))
        if bool((named := background != UNNAMED).any()):
            loss = loss + F.cross_entropy(scene[:, :-1][named], background[named])
        loss = loss + F.binary_cross_entropy_with_logits(scene[:, -1], cut)
        text = self.text(F.rms_norm(late.float(), late.shape[-1:]))
        target = events.text[..., 1:].flatten(0, 1).float()
        loss = loss + 2 * F.binary_cross_entropy_with_logits(text, target)
        loss = loss + self._frame_numbers(batch, step, after) + self._comparisons(batch, step)
        late_hidden = self._hidden(step, LOOKUP_DEPTH, batch)[:, after].flatten(0, 1)
        so_far = events.so_far.flatten(0, 1).unsqueeze(1)
        loss = loss + self.pair_loss(self.so_far(late_hidden), so_far, "seen so far")
        if pointers := _of_kind(batch, "time"):
            rows, places = _rows_and_places(pointers, batch.layout.length, early.device)
            frames = torch.tensor([pointer.frame for pointer in pointers], device=early.device)
            visible = events.pairs[rows, frames, :1]
            x = self._hidden(step, LOOKUP_DEPTH, batch)[rows, places]
            loss = loss + self.pair_loss(self.looked_up(x), visible, "time look-up")
        return loss

    def _frame_numbers(self, batch: PackedBatch[Tensor], step: TreeStep, after: list[int]) -> Tensor:
        """The token after a frame knows the frame's number, an object's name the numbers of its first and last frame:
        what comes earlier is then a difference."""
        early = self._hidden(step, CHANGE_DEPTH, batch)[:, after]
        number = self.number(F.rms_norm(early.float(), early.shape[-1:])).squeeze(-1)
        error = (number - torch.arange(len(after), device=early.device) / FRAME_UNIT).pow(2).mean()
        self.record("frame number error", float(error.detach().sqrt() * FRAME_UNIT), 1.0)
        late = self._hidden(step, LOOKUP_DEPTH, batch)
        edges: tuple[PointerKind, ...] = ("first", "last")
        for which, kind in enumerate(edges):
            if named := _of_kind(batch, kind):
                x = late[_rows_and_places(named, batch.layout.length, late.device)]
                edges_seen = self.edges(F.rms_norm(x.float(), x.shape[-1:]))[:, which]
                frames = torch.tensor([pointer.frame for pointer in named], device=late.device)
                miss = (edges_seen - frames / FRAME_UNIT).pow(2).mean()
                self.record(f"{kind} frame error", float(miss.detach().sqrt() * FRAME_UNIT), 1.0)
                error = error + miss
        return FRAME_WEIGHT * error

    def _comparisons(self, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """The second name of a question about order knows whether its object is the later one."""
        device, comparisons = batch.labels.device, batch.comparisons
        if not comparisons:
            return torch.zeros((), device=device)
        rows = torch.tensor([comparison.row for comparison in comparisons], device=device)
        places = torch.tensor([comparison.place + batch.layout.length for comparison in comparisons], device=device)
        x = self._hidden(step, COMPARE_DEPTH, batch)[rows, places]
        logits = self.later(F.rms_norm(x.float(), x.shape[-1:])).squeeze(-1)
        later = torch.tensor([comparison.later for comparison in comparisons], device=device)
        self.record("which comes later", float(((logits > 0) == later).sum()), len(later))
        return COMPARE_WEIGHT * F.binary_cross_entropy_with_logits(logits, later.float())

    def _track(self, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """What the token after each frame knows of cuts, visual tokens and questions of their object."""
        after = [batch.layout.after(frame) for frame in range(batch.layout.frames)]
        backgrounds, cut = batch.events.background.flatten(), batch.events.cut.flatten()
        x = self._hidden(step, LOOKUP_DEPTH, batch)[:, after].flatten(0, 1)
        loss = self._read("cut", x, torch.where(cut, 1.0, -1.0).unsqueeze(1))
        if bool((named := backgrounds != UNNAMED).any()):
            x = self._hidden(step, SEEN_DEPTH, batch)[:, after].flatten(0, 1)[named]
            values = 2.0 * F.one_hot(backgrounds[named], len(BACKGROUND_IDS)) - 1
            loss = loss + self._read("background", x, values)
        return loss + self._read_sightings(batch, step) + self._read_findings(batch, step)

    def _read_sightings(self, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """What visual tokens know of the object in their cell."""
        rows, places = batch.sightings.places.unbind(1)
        loss = torch.zeros((), device=rows.device)
        place, size, times, moved = batch.sightings.values.split((2, 1, 1, 2), dim=1)
        known: dict[FindingKind, Tensor] = {"place": place, "size": size, "times": times, "direction": moved}
        for depth in (SEEN_DEPTH, CHANGE_DEPTH, LOOKUP_DEPTH) if len(rows) else ():
            x = self._hidden(step, depth, batch)[rows, places]
            for kind, values in known.items():
                if kind in ("place", "size") or depth != SEEN_DEPTH:
                    loss = loss + self._read(kind, x, values, f"seen at {depth} ")
        return loss

    def _read_findings(self, batch: PackedBatch[Tensor], step: TreeStep) -> Tensor:
        """What questions know of their object: first the tokens that find it out, then those that answer."""
        loss = torch.zeros((), device=batch.labels.device)
        for kind in FINDINGS:
            for answers in (False, True):
                named = [finding for finding in batch.findings if (finding.kind, finding.answers) == (kind, answers)]
                if not named:
                    continue
                depth = COMPARE_DEPTH if answers else LOOKUP_DEPTH
                rows, places = _rows_and_places(named, batch.layout.length, loss.device)
                values = torch.tensor([finding.values for finding in named], device=loss.device)
                x = self._hidden(step, depth, batch)[rows, places]
                loss = loss + self._read(kind, x, values, "answers " if answers else "")
        return loss

    def _read(
        self, kind: FindingKind | Literal["cut", "background"], x: Tensor, values: Tensor, prefix: str = ""
    ) -> Tensor:
        """The squared error of `values` [n, k] in the directions of hidden states `x` [n, d] that hold them; positive
        and negative ones count alike."""
        out = F.rms_norm(x.float(), x.shape[-1:]) @ self._directions[DIRECTIONS[kind]].T
        positive = values > 0
        share = positive.float().mean(0).clamp(0.02, 0.98)
        weight = torch.where(positive, 0.5 / share, 0.5 / (1 - share))
        right = ((out > 0) == positive).float() * weight
        self.record(f"{prefix}{kind}", float(right.mean()), 1.0)
        return (weight * (out - values).pow(2)).mean()

    def pair_loss(self, logits: Tensor, target: Tensor, name: str) -> Tensor:
        """Binary cross-entropy, summed over kinds and trained pairs, averaged over rows; the log gets the share of rows
        with something in them that are right in every pair."""
        logits, wanted = logits[..., self._trained], target[..., self._trained]
        some = wanted.flatten(1).any(1)
        right = ((logits > 0) == wanted).flatten(1).all(1)
        self.record(name, float(right[some].sum()), float(some.sum()))
        rare = torch.tensor(RARE, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, wanted.float(), pos_weight=rare, reduction="sum")
        return loss / logits.shape[0]


def _of_kind(batch: PackedBatch[Tensor], kind: PointerKind) -> list[Pointer]:
    return [pointer for pointer in batch.pointers if pointer.kind == kind]


def _rows_and_places(pointers: Sequence[Pointer | Finding], trunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequence and place, counted from the start of the sequence, of each pointer's token."""
    rows, places = [p.row for p in pointers], [p.place + trunk for p in pointers]
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)
