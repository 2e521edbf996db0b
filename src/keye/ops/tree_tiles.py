"""Attention over trees of segments in plain torch, forward and backward: the definition, and what runs where no
compiled kernel does. `keye.ops.tree` says what is computed.

Queries are taken in blocks and keys in tiles, so that scratch memory is bounded whatever the lengths. Segments with the
same ancestors are computed together: one product of all their queries with the shared keys.

Legend: n queries of a block, N keys of a tile, H heads, G groups, R = H / G, D head dim, J indexer heads, I their dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from keye.ops.reference import QUERY_BLOCK, SCRATCH_BYTES

#: Queries that dense attention takes at once.
DENSE_BLOCK: Final = 128
#: Below every logit, and finite: what a running maximum starts from.
_LEAST: Final = -1e30
_LOG2_E: Final = math.log2(math.e)
#: Operands that have one row a key; the others have one a query.
_KEY_LIKE: Final = (1, 2, 4)


class Segment(NamedTuple):
    """Tokens that attend together: rows start .. stop of the queries. Their keys are the rows of the intervals `keys`,
    in order; the last interval ends with the segment's own tokens. `first` counts the keys before the first query:
    query i sees keys 0 .. first + i."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    first: int

    @property
    def length(self) -> int:
        """Keys that the last query sees."""
        return self.first + self.stop - self.start

    def rows(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Rows int64 of keys begin .. end."""
        parts, at = [], 0
        for start, stop in self.keys:
            low, high = max(begin, at), min(end, at + stop - start)
            if low < high:
                parts.append(torch.arange(start + low - at, start + high - at, device=device))
            at += stop - start
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


class Operands(NamedTuple):
    """`q` [T, H, D], `k` [S, G, D], `v` [S, G, Dv]; of the indexer, where it is taught, `indexer_q` [T, J, I],
    `indexer_k` [S, I] and `gate` [T, J]."""

    q: Tensor
    k: Tensor
    v: Tensor
    indexer_q: Tensor | None = None
    indexer_k: Tensor | None = None
    gate: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward pass computes: those of q, k and v, and those of the indexer."""

    attention: bool
    indexer: bool


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass: `out` [T, H, Dv], and float32 logarithms to base 2 of softmax
    sums, `lse` [T, H] and `indexer_lse` [T] where the indexer is taught; infinite for queries without keys."""

    out: Tensor
    lse: Tensor
    indexer_lse: Tensor | None


@dataclass(frozen=True)
class Block:
    """Queries (rows int64 [n]) that are computed together and the keys (rows int64 [N]) that any of them sees;
    `visible(a, b)` is the bool mask [n, b - a] of keys a .. b."""

    queries: Tensor
    keys: Tensor
    visible: Callable[[int, int], Tensor]

    def tiles(self, operands: Operands) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the keys of a tile, and their mask."""
        (_, H, _), (_, G, D) = operands.q.shape, operands.k.shape
        heads = H + (0 if operands.indexer_q is None else operands.indexer_q.shape[1])
        row_bytes = 16 * len(self.queries) * heads + 12 * G * (D + operands.v.shape[2])
        width = max(64, SCRATCH_BYTES // row_bytes)
        for start in range(0, len(self.keys), width):
            stop = min(len(self.keys), start + width)
            yield self.keys[start:stop], self.visible(start, stop)


def make_blocks(segments: Sequence[Segment], sets: Tensor | None, device: torch.device) -> Iterator[Block]:
    """The blocks of dense attention, or of attention over `sets` int32 [T, K] of rows."""
    if sets is None:
        yield from _dense_blocks(segments, device)
        return
    for start in range(0, len(sets), QUERY_BLOCK):
        part = sets[start : start + QUERY_BLOCK]
        union, where = torch.unique(part, return_inverse=True)
        mask = torch.zeros(len(part), len(union), dtype=torch.bool, device=device).scatter_(1, where, True)
        if len(union) and union[0] < 0:
            union, mask = union[1:], mask[:, 1:]
        if len(union):
            queries = torch.arange(start, start + len(part), device=device)
            yield Block(queries, union.long(), lambda a, b, mask=mask: mask[:, a:b])  # type: ignore[misc]


def _dense_blocks(segments: Sequence[Segment], device: torch.device) -> Iterator[Block]:
    siblings: dict[tuple[tuple[int, int], ...], list[Segment]] = {}
    for segment in segments:
        siblings.setdefault(segment.keys[:-1], []).append(segment)
    for shared, members in siblings.items():
        pieces: list[tuple[Segment, int, int]] = []
        room = DENSE_BLOCK
        for segment in members:
            begin, total = 0, segment.stop - segment.start
            while begin < total:
                end = min(total, begin + room)
                pieces.append((segment, begin, end))
                room, begin = room - (end - begin), end
                if room == 0:
                    yield _dense_block(shared, pieces, device)
                    pieces, room = [], DENSE_BLOCK
        if pieces:
            yield _dense_block(shared, pieces, device)


def _dense_block(
    shared: tuple[tuple[int, int], ...], pieces: Sequence[tuple[Segment, int, int]], device: torch.device
) -> Block:
    """Queries begin .. end of segments that share all intervals but their last."""
    before = sum(stop - start for start, stop in shared)
    keys = [torch.arange(start, stop, device=device) for start, stop in shared]
    queries, last, owners, numbers, owner_of_query = [], [], [], [], []
    if before:
        owners.append(torch.full((before,), -1, device=device))
        numbers.append(torch.arange(before, device=device))
    for owner, (segment, begin, end) in enumerate(pieces):
        queries.append(torch.arange(segment.start + begin, segment.start + end, device=device))
        last.append(segment.first + torch.arange(begin, end, device=device))
        owner_of_query.append(torch.full((end - begin,), owner, device=device))
        own = segment.rows(before, segment.first + end, device)
        keys.append(own)
        owners.append(torch.full((len(own),), owner, device=device))
        numbers.append(before + torch.arange(len(own), device=device))
    owner_N, number_N = torch.cat(owners), torch.cat(numbers)
    owner_n1, last_n1 = torch.cat(owner_of_query).unsqueeze(1), torch.cat(last).unsqueeze(1)

    def visible(a: int, b: int) -> Tensor:
        owner, number = owner_N[a:b], number_N[a:b]
        return ((owner < 0) | (owner == owner_n1)) & (number <= last_n1)

    return Block(torch.cat(queries), torch.cat(keys), visible)


def forward(
    operands: Operands, segments: Sequence[Segment], sets: Tensor | None, *, teach: bool
) -> tuple[Saved, Tensor]:
    """What is saved, and the loss of the indexer, float32."""
    q, v = operands.q, operands.v
    saved = Saved(
        q.new_zeros(*q.shape[:2], v.shape[2]), torch.full(q.shape[:2], torch.inf, device=q.device),
        torch.full(q.shape[:1], torch.inf, device=q.device) if teach else None,
    )  # fmt: skip
    kl_sum = torch.zeros((), device=q.device)
    for block in make_blocks(segments, sets, q.device):
        out, lse = _attend(block, operands)
        saved.out[block.queries], saved.lse[block.queries] = out.to(q.dtype), lse
        if saved.indexer_lse is not None:
            indexer_lse = _indexer_lse(block, operands)
            saved.indexer_lse[block.queries] = indexer_lse
            kl_sum += _indexer_kl(block, operands, lse, indexer_lse)
    return saved, kl_sum


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[n, H, D] -> float32 [G, R * n, D], the heads of a group behind one another."""
    n, H, D = x.shape
    return x.float().view(n, groups, H // groups, D).permute(1, 2, 0, 3).reshape(groups, -1, D)


def _ungrouped(x: Tensor, n: int) -> Tensor:
    """[G, R * n, ...] -> [n, H, ...]."""
    return x.unflatten(1, (-1, n)).movedim(2, 0).flatten(1, 2)


def _scaled(q: Tensor, groups: int) -> Tensor:
    """Queries [n, H, D] whose products with keys are logits to base 2: [G, R * n, D]."""
    return _grouped(q, groups) * (q.shape[2] ** -0.5 * _LOG2_E)


def _logits(q: Tensor, k: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """Logits to base 2 of scaled queries against rows of the keys: [G, R * n, N], -inf where masked."""
    logits = torch.matmul(q, k[rows].float().permute(1, 2, 0))
    logits.view(-1, *mask.shape).masked_fill_(~mask, -torch.inf)
    return logits


def _attend(block: Block, operands: Operands, *, values: bool = True) -> tuple[Tensor, Tensor]:
    """Output float32 [n, H, Dv] (without `values`, of no width) and lse [n, H], over tiles of keys: sums under a
    running maximum."""
    q, k, v = operands[:3]
    n, G = len(block.queries), k.shape[1]
    scaled = _scaled(q[block.queries], G)
    largest, total = scaled.new_full((*scaled.shape[:2], 1), _LEAST), scaled.new_zeros(*scaled.shape[:2], 1)
    sums = scaled.new_zeros(*scaled.shape[:2], v.shape[2] if values else 0)
    for rows, mask in block.tiles(operands):
        logits = _logits(scaled, k, rows, mask)
        raised = torch.maximum(largest, logits.amax(-1, keepdim=True))
        weights, rescale = logits.sub_(raised).exp2_(), (largest - raised).exp2_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        if values:
            sums = sums.mul_(rescale).add_(torch.matmul(weights, v[rows].float().transpose(0, 1)))
        largest = raised
    lse = torch.where(total > 0, largest + total.log2(), torch.inf).squeeze(2)
    return _ungrouped(sums / total.clamp_min(1e-30), n), _ungrouped(lse, n)


def _products(operands: Operands, queries: Tensor, rows: Tensor) -> Tensor:
    """relu(q . k) of the indexer, float32 [n, J, N]."""
    assert operands.indexer_q is not None and operands.indexer_k is not None
    return torch.matmul(operands.indexer_q[queries].float(), operands.indexer_k[rows].float().mT).relu_()


def _scores(operands: Operands, queries: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """I[t, s] as logits to base 2, float32 [n, N], -inf where masked."""
    assert operands.gate is not None
    products = _products(operands, queries, rows)
    scores = torch.einsum("njs,nj->ns", products, operands.gate[queries].float())
    return scores.mul_(_LOG2_E).masked_fill_(~mask, -torch.inf)


def _indexer_lse(block: Block, operands: Operands) -> Tensor:
    lse = torch.full((len(block.queries),), -torch.inf, device=operands.q.device)
    for rows, mask in block.tiles(operands):
        scores = _scores(operands, block.queries, rows, mask)
        largest = scores.amax(1, keepdim=True).clamp_min(_LEAST)
        lse = torch.logaddexp2(lse, largest.squeeze(1) + (scores - largest).exp2_().sum(1).log2_())
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _probabilities(block: Block, operands: Operands, lse: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """Softmax of every head, float32 [G, R * n, N]."""
    G = operands.k.shape[1]
    logits = _logits(_scaled(operands.q[block.queries], G), operands.k, rows, mask)
    return logits.sub_(_grouped(lse.unsqueeze(2), G)).exp2_()


def _indexer_kl(block: Block, operands: Operands, lse: Tensor, indexer_lse: Tensor) -> Tensor:
    """Summed over queries and groups."""
    total = torch.zeros((), device=lse.device)
    for rows, mask in block.tiles(operands):
        teachers = _probabilities(block, operands, lse, rows, mask).unflatten(1, (-1, len(block.queries))).mean(1)
        log_q = _scores(operands, block.queries, rows, mask).sub_(indexer_lse[:, None]).div_(_LOG2_E)
        log_q.masked_fill_(~mask, 0)
        total += torch.special.xlogy(teachers, teachers).sum() - (teachers.sum(0) * log_q).sum()
    return total


def backward(
    operands: Operands, segments: Sequence[Segment], sets: Tensor | None, saved: Saved, grad_out: Tensor,
    grad_kl: Tensor, needs: Needs,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the operands, in their dtypes; None where not needed. `grad_kl` is that of the indexer's loss."""
    wanted = [*(needs.attention,) * 3, *(needs.indexer,) * 3]
    inputs = {i: x for i, (x, want) in enumerate(zip(operands, wanted, strict=True)) if want and x is not None}
    grads: list[Tensor | None] = [torch.zeros_like(inputs[i]) if i in inputs else None for i in range(len(wanted))]
    # Summed in float32: keys over all blocks, queries over the tiles of their own.
    keys = {i: torch.zeros_like(inputs[i], dtype=torch.float32) for i in _KEY_LIKE if i in inputs}
    for block in make_blocks(segments, sets, operands.q.device):
        queries, n = block.queries, len(block.queries)
        sums = keys | {i: torch.zeros(n, *x.shape[1:], device=x.device) for i, x in inputs.items() if i not in keys}
        for rows, mask in block.tiles(operands):
            probs = _probabilities(block, operands, saved.lse[queries], rows, mask)
            if needs.attention:
                _add_gradients(queries, rows, operands, probs, saved, grad_out, sums)
            if needs.indexer:
                _teach(queries, rows, mask, operands, probs, saved, grad_kl, sums)
        for i in inputs.keys() - keys.keys():
            grad = grads[i]
            assert grad is not None
            grad[queries] = sums[i].to(grad.dtype)
    for i, total in keys.items():
        grads[i] = total.to(inputs[i].dtype)
    return grads


def _add_gradients(
    queries: Tensor, rows: Tensor, operands: Operands, probs: Tensor, saved: Saved, grad_out: Tensor,
    sums: Mapping[int, Tensor],
) -> None:  # fmt: skip
    """Adds what one tile gives to the gradients of q, k and v."""
    (q, k, v), G, scale = operands[:3], operands.k.shape[1], operands.q.shape[2] ** -0.5
    upstream = _grouped(grad_out[queries], G)
    delta = (upstream * _grouped(saved.out[queries], G)).sum(-1, keepdim=True)
    sums[2].index_add_(0, rows, torch.matmul(probs.mT, upstream).transpose(0, 1))
    grad_logits = torch.matmul(upstream, v[rows].float().permute(1, 2, 0)).sub_(delta).mul_(probs).mul_(scale)
    sums[0].add_(_ungrouped(torch.matmul(grad_logits, k[rows].float().transpose(0, 1)), len(queries)))
    sums[1].index_add_(0, rows, torch.matmul(grad_logits.mT, _grouped(q[queries], G)).transpose(0, 1))


def _teach(
    queries: Tensor, rows: Tensor, mask: Tensor, operands: Operands, probs: Tensor, saved: Saved, grad_kl: Tensor,
    sums: Mapping[int, Tensor],
) -> None:  # fmt: skip
    """Adds what one tile gives to the gradients of the indexer's queries, keys and gates."""
    indexer_q, indexer_k, gate = operands[3:]
    assert indexer_q is not None and indexer_k is not None and gate is not None and saved.indexer_lse is not None
    teacher = probs.view(-1, *mask.shape).mean(0)
    student = _scores(operands, queries, rows, mask).sub_(saved.indexer_lse[queries, None]).exp2_()
    grad_scores = (student - teacher) * (grad_kl * operands.k.shape[1])
    products = _products(operands, queries, rows)
    sums[5].add_(torch.einsum("njs,ns->nj", products, grad_scores))
    grad_products = grad_scores[:, None] * gate[queries].float()[..., None] * (products > 0)
    sums[3].add_(torch.matmul(grad_products, indexer_k[rows].float()))
    sums[4].index_add_(0, rows, torch.einsum("njs,nji->si", grad_products, indexer_q[queries].float()))


class Recall(NamedTuple):
    """Shares of dense attention, averaged over heads and summed over `rows` queries that see more keys than they
    select: `mass` is what the selected keys get, `best` what the best as many keys would get."""

    mass: float
    best: float
    rows: int

    @property
    def against_best(self) -> float:
        """Recall against the best keys, 1 at most; 1 where nothing was left out."""
        return self.mass / self.best if self.rows else 1.0


@torch.no_grad()
def measure_recall(operands: Operands, segments: Sequence[Segment], sets: Tensor) -> Recall:
    """The recall of `sets` int32 [T, K]."""
    operands, topk = Operands(*operands[:3]), sets.shape[1]
    mass = best = torch.zeros((), device=sets.device)
    count = 0
    for block in make_blocks(segments, None, sets.device):
        N, n = len(block.keys), len(block.queries)
        if N <= topk:
            continue
        lse = _attend(block, operands, values=False)[1]
        slots = torch.full((operands.k.shape[0] + 1,), N, device=sets.device)
        slots[block.keys] = torch.arange(N, device=sets.device)
        chosen = torch.zeros(n, N + 1, dtype=torch.bool, device=sets.device)
        chosen.scatter_(1, slots[sets[block.queries].long()], True)  # -1 is the last slot, that of no key
        largest, inside = lse.new_zeros(n, 0), lse.new_zeros(n)
        at, seen = 0, torch.zeros(n, dtype=torch.int64, device=sets.device)
        for rows, mask in block.tiles(operands):
            shares = _probabilities(block, operands, lse, rows, mask).view(-1, *mask.shape).mean(0)
            inside += (shares * chosen[:, at : at + len(rows)]).sum(1)
            largest = torch.cat((largest, shares), dim=1)
            largest = largest.topk(min(topk, largest.shape[1]), dim=1, sorted=False).values
            seen, at = seen + mask.sum(1), at + len(rows)
        some = seen > topk
        mass, best = mass + inside[some].sum(), best + largest[some].sum()
        count += int(some.sum())
    return Recall(float(mass), float(best), count)
