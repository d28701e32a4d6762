"""Learning rates: continuous, warm up linearly, end where they say."""

import itertools

import pytest
import torch
from cases import LEARNING_RATES

import lightning_diffusion as ld

TOTAL = 1000


@pytest.mark.parametrize("rate", LEARNING_RATES, ids=repr)
def test_factor_is_within_bounds_and_without_jumps(rate):
    factors = [rate(step, TOTAL, 64) for step in range(TOTAL + 1)]
    assert all(0 <= f <= 1 for f in factors)
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) < 0.02


@pytest.mark.parametrize("rate", [ld.WarmupConstant, ld.WarmupLinear, ld.WarmupCosine], ids=repr)
def test_warmup_is_linear_and_never_zero(rate):
    factors = [rate(warmup_steps=9)(step, 1e9, 64) for step in range(10)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_ends():
    assert ld.WarmupConstant()(TOTAL, TOTAL, 1) == 1
    assert ld.WarmupLinear()(TOTAL, TOTAL, 1) == 0
    assert ld.WarmupCosine()(TOTAL, TOTAL, 1) == pytest.approx(0, abs=1e-12)
    assert ld.WarmupCosine(warmup_steps=0)(TOTAL // 2, TOTAL, 1) == pytest.approx(0.5)


def test_inverse_square_root_halves_when_steps_quadruple():
    rate = ld.WarmupInverseSquareRoot(warmup_images=0, reference_steps=50)
    assert rate(50, TOTAL, 1) == 1
    assert rate(200, TOTAL, 1) == pytest.approx(rate(800, TOTAL, 1) * 2)


def test_warmup_in_images_does_not_depend_on_the_batch_size():
    """Half-way through 6,400 images the factor is a half, in 50 steps of 64 or 100 of 32."""
    rate = ld.WarmupConstant(warmup_steps=0, warmup_images=6400)
    assert rate(50, TOTAL, 64) == pytest.approx(0.5, abs=0.01)
    assert rate(100, TOTAL, 32) == pytest.approx(0.5, abs=0.01)


def test_endless_training_never_decays():
    assert ld.WarmupCosine()(10**9, float("inf"), 1) == 1


def test_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="at least 0 steps"):
        ld.WarmupCosine(warmup_steps=-1)


def test_the_rate_follows_steps_that_were_taken():
    """A guard drops gradients in every third step; where nothing was backpropagated there is no step either."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    schedule = ld.TakenStepsLR(optimizer, lambda taken: 0.5**taken)
    rates = []
    for step in range(6):
        p.grad = None if step % 3 == 1 else torch.ones(2)
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    schedule.step()
    assert rates == [0.5, 0.5, 0.25, 0.125, 0.125, 0.0625]
    resumed = ld.TakenStepsLR(torch.optim.SGD([p], lr=1.0), lambda taken: 0.5**taken)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.last_epoch == schedule.last_epoch == 4
    assert "_verdict" not in schedule.state_dict()
