"""Which format on which machine: the arithmetic on bytes and bandwidths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from keye.planning.machines import choose_format, common_machines, published_sizes, recommend  # fmt: skip
from keye.planning.placement import DDR5, REACHED, Hardware, ModelSizes, place
from keye.process import Memory
from keye.units import GIB


@pytest.fixture(scope="module")
def large() -> ModelSizes:
    return published_sizes()["2.0"]


def test_bytes_of_the_published_2_0_in_each_format(large: ModelSizes) -> None:
    """int4: 4 bits and a 16-bit scale for 64 columns of all matrices but the indexer's, the tower's and the
    projector's."""
    experts = 48 * 128 * 3 * 2048 * 768
    parts = large.parts
    assert parts["bf16"]["experts"] == 2 * experts
    assert parts["int4"]["experts"] == experts // 2 + experts // 64 * 2
    assert parts["int8"]["experts"] == experts + 48 * 128 * 2 * (2 * 768 + 2048)
    assert parts["int4"]["router"] == parts["bf16"]["router"]
    assert parts["int4"]["indexer"] == parts["int8"]["indexer"] < parts["bf16"]["indexer"]
    assert 16.5e9 < sum(parts["int4"].values()) <= 17.5e9
    assert "packing table (never read)" not in parts["int4"]


@pytest.mark.parametrize("machine", common_machines(), ids=lambda machine: machine.name)
def test_a_placement_holds_every_byte_once_and_overfills_nothing(large: ModelSizes, machine: Hardware) -> None:
    placed = place(large, machine, "int4", 8192)
    total = sum(large.parts["int4"].values()) + large.context_bytes(8192)
    assert placed.card + placed.memory + placed.disk == total
    assert placed.card <= machine.card_room and placed.memory <= machine.memory_room
    assert sum(placed.experts.values()) == pytest.approx(1, abs=1e-3)


def test_the_rate_is_what_a_token_reads_at_the_bandwidth(large: ModelSizes) -> None:
    placed = place(large, Hardware("computer", 64 * GIB, 50e9), "int4", 4096)
    chosen = large.parts["int4"]["experts"] * 8 // 128
    cached = 2 * (2048 * large.kv_numbers + 4096 * large.indexer_numbers)
    others = ("attention", "indexer", "router", "norms", "head")
    read = chosen + cached + sum(large.parts["int4"][part] for part in others)
    assert placed.read == {"card": 0, "memory": read, "disk": 0}
    assert placed.tokens_per_second == pytest.approx(REACHED * 50e9 / read, abs=0.01)


def test_what_does_not_fit_and_what_is_too_slow_is_refused_in_one_sentence(large: ModelSizes) -> None:
    small = place(published_sizes()["1.5"], Hardware("GPU", 32 * GIB, DDR5, 8 * GIB, 272e9), "bf16", 8192)
    assert small.refusal is not None and "bf16 does not fit" in small.refusal and "GPU has 7 GiB" in small.refusal
    slow = place(large, Hardware("computer", 16 * GIB, DDR5, disk_bandwidth=0.15e9), "int4", 8192)
    assert slow.refusal is not None and "too slow" in slow.refusal and "from disk" in slow.refusal
    fast = place(large, Hardware("computer", 16 * GIB, DDR5), "int4", 8192)
    assert fast.refusal is None and fast.disk > 0 and not fast.is_whole


def test_experts_that_do_not_fit_a_gpu_lie_in_main_memory(large: ModelSizes) -> None:
    placed = place(large, Hardware("GPU", 32 * GIB, DDR5, 12 * GIB, 504e9), "int4", 16384)
    assert placed.refusal is None and placed.disk == 0 and set(placed.experts) == {"card", "memory"}
    faster = place(large, Hardware("GPU", 32 * GIB, DDR5, 16 * GIB, 504e9), "int4", 16384)
    assert faster.experts["card"] > placed.experts["card"]
    assert faster.tokens_per_second > placed.tokens_per_second


def test_a_chosen_format_is_the_most_exact_that_fits_and_is_quick(large: ModelSizes) -> None:
    def chosen(machine: Hardware) -> str | None:
        choice = choose_format(large, machine)
        return None if choice is None else choice[0].weights

    assert chosen(Hardware("GPU", 32 * GIB, DDR5, 80 * GIB, 2e12)) == "bf16"
    assert chosen(Hardware("GPU", 32 * GIB, DDR5, 48 * GIB, 864e9)) == "int8"
    assert chosen(Hardware("computer", 24 * GIB, DDR5)) == "int4"
    assert chosen(Hardware("computer", 4 * GIB, DDR5)) is None


def test_a_recommendation_says_how_it_was_reckoned(large: ModelSizes) -> None:
    memory = [Memory("cpu", 32 * GIB, 28 * GIB), Memory("cuda:0", 24 * GIB, 23 * GIB)]
    recommended = recommend(large, memory, {"cpu": 40e9, "cuda:0": 800e9})
    assert recommended is not None
    assert (recommended["device"], recommended["format"]) == ("cuda:0", "int4")
    assert recommended["options"] == ["--quant", "int4", "--device", "cuda:0"]
    assert "15.6 GiB of weights" in recommended["sentence"] and "800 GB/s" in recommended["sentence"]
    assert recommend(large, [Memory("cpu", 2 * GIB, 2 * GIB)], {"cpu": 40e9}) is None
    small = recommend(large, [Memory("cpu", 12 * GIB, 12 * GIB)], {"cpu": 40e9})
    assert small is not None and "of the experts on disk" in small["sentence"]
    assert small["options"] == ["--quant", "int4", "--experts", "disk"]


def test_a_model_whose_decoder_is_only_described_is_placed_too() -> None:
    latent = published_sizes()["671b"]
    assert place(latent, Hardware("computer", 512 * GIB, 8 * DDR5), "int4", 8192).refusal is None
    assert place(replace(latent, config=None), Hardware("computer", 64 * GIB, DDR5), "int4", 8192).refusal is not None
