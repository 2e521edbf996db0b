"""Losses of pairs against naive versions."""

import math

import pytest
import torch

from keye.train.preferences import Pairs, RewardShift, bco_loss, dpo_loss


def random_pairs(n=4):
    generator = torch.Generator().manual_seed(0)
    values = [-10 * torch.rand(n, generator=generator) for _ in range(4)]
    return Pairs(values[0].requires_grad_(), values[1].requires_grad_(), *values[2:])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_is_the_naive_formula():
    pairs = random_pairs()
    for i, loss in enumerate(dpo_loss(pairs, 0.3).tolist()):
        won = float(pairs.chosen[i].detach() - pairs.reference_chosen[i])
        lost = float(pairs.rejected[i].detach() - pairs.reference_rejected[i])
        assert loss == pytest.approx(-math.log(sigmoid(0.3 * (won - lost))), rel=1e-5)


def test_bco_is_the_naive_formula():
    pairs = random_pairs()
    for i, loss in enumerate(bco_loss(pairs, 0.3, 0.2).tolist()):
        won = 0.3 * float(pairs.chosen[i].detach() - pairs.reference_chosen[i])
        lost = 0.3 * float(pairs.rejected[i].detach() - pairs.reference_rejected[i])
        expected = -math.log(sigmoid(won - 0.2)) - math.log(sigmoid(-(lost - 0.2)))
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [lambda pairs: dpo_loss(pairs, 0.1), lambda pairs: bco_loss(pairs, 0.1, 0.0)])
def test_the_better_reply_is_made_likelier_and_the_other_less(loss):
    pairs = random_pairs()
    loss(pairs).sum().backward()
    assert bool((pairs.chosen.grad < 0).all())
    assert bool((pairs.rejected.grad > 0).all())


def test_at_the_reference_the_losses_are_those_of_not_knowing():
    same = torch.tensor([-3.0, -7.0])
    pairs = Pairs(same, same, same, same)
    assert dpo_loss(pairs, 0.5).tolist() == pytest.approx([math.log(2)] * 2)
    assert bco_loss(pairs, 0.5, 0.0).tolist() == pytest.approx([2 * math.log(2)] * 2)


def test_the_shift_is_the_mean_of_all_rewards():
    shift, rewards = RewardShift(), []
    for number in range(3):
        pairs, counted = random_pairs(number + 2), torch.arange(number + 2) > 0  # the first one fills up a step
        rewards += [float(r) for r in torch.stack(pairs.rewards(0.5)).detach()[:, counted].flatten()]
        assert float(shift.update(pairs, 0.5, counted)) == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    with torch.no_grad():  # held-out pairs change nothing
        assert float(shift.update(random_pairs(), 0.5, torch.ones(4, dtype=torch.bool))) == float(shift.mean.float())
