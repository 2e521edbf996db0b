"""Fresh weights: sizes, and number tokens that know their value."""

import torch

from keye.chat.tokenizer import Tokenizer
from keye.train.recipes.nano.initialise import fresh_model, number_tokens, order_numbers
from tests.support.tiny import NANO, tiny_config


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, second, third = fresh_model(tiny_config(), 1), fresh_model(tiny_config(), 1), fresh_model(tiny_config(), 2)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_no_weight_is_left_unfilled():
    model = fresh_model(tiny_config(), 0)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 100, name


def test_near_numbers_have_near_embeddings_and_each_is_its_own_nearest():
    tokenizer = Tokenizer.from_file(NANO)
    numbers = number_tokens(tokenizer)
    assert len(numbers["integer"]) == 1000 and len(numbers["fraction"]) == 10
    model = fresh_model(tiny_config(), 0)
    order_numbers(model, numbers)
    ids = sorted(numbers["integer"], key=lambda i: numbers["integer"][i])
    x = torch.nn.functional.normalize(model.model.embed_tokens.weight[ids], dim=1)
    likeness = x @ x.T
    assert (likeness.argmax(1) == torch.arange(1000)).all()
    assert likeness.diagonal(1).mean() > likeness.diagonal(50).mean() + 0.2
