"""What a model that no single GPU holds takes of large ones."""

from __future__ import annotations

import pytest

from keye.config import read_json
from keye.hub import asset
from keye.models.outline import outline
from keye.planning.cards import CARD, cards_sentence, count_cards, float8_bytes


def test_the_largest_model_takes_eight_cards_in_int4() -> None:
    model = outline(read_json(asset("configs/671b") / "config.json"))
    counted = {cards.weights: cards for cards in count_cards(model)}
    assert {name: cards.cards for name, cards in counted.items()} == {"bf16": 32, "fp8": 16, "int8": 16, "int4": 8}
    assert float8_bytes(model) == pytest.approx(672.8e9, rel=0.005), "a byte a number, and 16-bit embeddings and head"
    for cards in counted.values():
        assert cards.nbytes / cards.cards < CARD < 2 * cards.nbytes / cards.cards
    assert "8 in int4" in cards_sentence(list(counted.values()))


@pytest.mark.parametrize("name", ["preview", "1.5", "2.0"])
def test_other_models_fit_one_card(name: str) -> None:
    assert count_cards(outline(read_json(asset(f"configs/{name}") / "config.json"))) == []
