"""The reference keeps to the device of its inputs: any device of torch can run it, without hidden tensors elsewhere.

A second device is missing here. Instead tensors made without a named device land on `meta`, which has no numbers and
mixes with no other device.
"""

from __future__ import annotations

import torch

from keye.ops import reference
from keye.ops.backend import REFERENCE, Stretch


def test_attention_and_selection_stay_on_the_device_of_their_inputs() -> None:
    q, keys = torch.randn(40, 8, 32), torch.randn(100, 2, 32)
    indexer_q, indexer_keys, gate = torch.randn(40, 4, 32), torch.randn(100, 32), torch.randn(40, 4)
    counts = torch.zeros(100, dtype=torch.int64)
    stretch = Stretch(
        0, 40, 60, rows=lambda at: (keys[at], keys[at]), key_tiles=lambda a, b: indexer_keys[a:b], counts=counts
    )
    sparse, dense, recent = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    with torch.device("meta"):
        REFERENCE.sparse(q, indexer_q, gate, [stretch], 16, sparse)
        REFERENCE.dense(q, [stretch], dense)
        sets = list(reference.select_recent(40, 60, 16, q.device))
        REFERENCE.attend(q, sets, stretch, recent)
    assert {positions.device for _, positions in sets} == {q.device}
    assert int(counts.sum()) == 2 * 40 * 16
    assert all(out.isfinite().all() for out in (sparse, dense, recent))


def test_rotary_angles_stay_on_the_device_of_the_positions() -> None:
    positions = torch.arange(27).view(3, 9)
    cpu = positions.device
    with torch.device("meta"):
        cos, sin = reference.rope_angles(positions, reference.inverse_frequencies(32, 1e4, cpu), (4, 6, 6))
    assert cos.device == sin.device == cpu
