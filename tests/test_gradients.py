"""What the clipping rules promise, against torch's own, a reference and their invariances."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from cases import CLIPPING_RULES
from hypothesis import given, settings
from hypothesis import strategies as st
from made_gradients import grads, parameters
from sync_counter import SyncCounter
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import scaling
from lightning_diffusion.gradients import Gradients, clip_adaptively_, sanitize_
from lightning_diffusion.norms import tensor_norms, total_norm, unit_norms

REFERENCE = json.loads((Path(__file__).parent / "reference" / "agc_unitwise.json").read_text())["cases"]
SHRINKING = [rule for rule in CLIPPING_RULES if not isinstance(rule, ld.Normalise)]
KEEPING_DIRECTION = [rule for rule in CLIPPING_RULES if not isinstance(rule, ld.Value)]
RELATIVE = [rule for rule in CLIPPING_RULES if rule.relative]


def clip(rule, made, groups=None):
    return rule(Gradients(groups or [made[:3], made[3:]]))


@pytest.fixture(params=["on the CPU", "as on an accelerator"])
def device(request, monkeypatch):
    """Both forms of every rule: the lazy one, and the one that never looks at a number."""
    if request.param == "as on an accelerator":
        monkeypatch.setattr(scaling, "readable", lambda x: False)
    return request.param


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: str(case["shape"]))
def test_adaptive_clipping_equals_the_reference(case, device):
    p = nn.Parameter(torch.tensor(case["weight"], dtype=torch.float64).view(case["shape"]))
    p.grad = torch.tensor(case["grad"], dtype=torch.float64).view(case["shape"])
    clip_adaptively_([p], case["clip"], case["eps"])
    assert_close(p.grad.flatten().tolist(), case["clipped"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("by_unit", [True, False])
def test_adaptive_clipping_equals_its_definition_as_a_loop(by_unit, device):
    made = parameters(1, spread=0.3)
    expected = grads(made)
    clipped, units = 0, 0
    for p, g in zip(made, expected, strict=True):
        pairs = zip(p.detach(), g, strict=True) if by_unit and p.ndim > 1 else [(p.detach(), g)]
        for w_i, g_i in pairs:
            length, limit = g_i.square().sum().sqrt(), 0.3 * max(float(w_i.square().sum().sqrt()), 1e-3)
            units, clipped = units + 1, clipped + int(length > limit)
            if length >= limit:
                g_i *= limit / max(length, 1e-6)
    share = clip(ld.Adaptive(0.3, by_unit=by_unit), made)
    assert 0 < clipped < units
    assert float(share) == pytest.approx(clipped / units)
    assert_close(grads(made), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.3, 1e3])
def test_the_global_norm_is_that_of_torch_bit_for_bit(dtype, max_norm, device):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    norm = Gradients([ours]).norm
    share = clip(ld.GlobalNorm(max_norm), ours)
    assert norm.equal(nn.utils.clip_grad_norm_(theirs, max_norm))
    assert all(a.equal(b) for a, b in zip(grads(ours), grads(theirs), strict=True))
    assert float(share) == (norm > max_norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_float32(dtype, device):
    made = parameters(dtype=dtype)
    exact = [g.double().norm() for g in grads(made)]
    assert_close(tensor_norms(grads(made)), [norm.float() for norm in exact])
    assert_close(total_norm(list(unit_norms(grads(made)[:1])[0])), exact[0].float())
    clip(ld.GlobalNorm(0.3), made)
    assert {g.dtype for g in grads(made)} == {dtype}
    assert_close(float(total_norm([g.double().norm() for g in grads(made)])), 0.3, rtol=8e-3, atol=0)


def test_torch_clips_a_group_a_parameter_and_a_value_alike(device):
    groups, single, value, ours = parameters(), parameters(), parameters(), parameters()
    nn.utils.clip_grad_norm_(groups[:3], 0.3)
    nn.utils.clip_grad_norm_(groups[3:], 0.3)
    clip(ld.ParameterGroupNorm(0.3), ours)
    assert_close(grads(ours), grads(groups), rtol=1e-14, atol=0)
    for p in single:
        nn.utils.clip_grad_norm_([p], 0.3)
    ours = parameters()
    clip(ld.ParameterNorm(0.3), ours)
    assert_close(grads(ours), grads(single), rtol=1e-14, atol=0)
    nn.utils.clip_grad_value_(value, 0.3)
    ours = parameters()
    clip(ld.Value(0.3), ours)
    assert_close(grads(ours), grads(value), rtol=0, atol=0)


@pytest.mark.parametrize("rule", CLIPPING_RULES, ids=repr)
def test_the_lazy_form_and_the_one_without_branches_agree(rule, monkeypatch):
    lazy, branchless = parameters(3), parameters(3)
    share = clip(rule, lazy)
    monkeypatch.setattr(scaling, "readable", lambda x: False)
    assert float(share) == float(clip(rule, branchless))
    assert_close(grads(lazy), grads(branchless), rtol=1e-15, atol=0)


BOUNDS = {
    ld.GlobalNorm: lambda made: [total_norm(tensor_norms(grads(made)))],
    ld.ParameterGroupNorm: lambda made: [
        total_norm(tensor_norms(grads(part))) for part in (made[:3], made[3:])
    ],
    ld.ParameterNorm: lambda made: tensor_norms(grads(made)),
    ld.UnitNorm: lambda made: unit_norms(grads(made)),
    ld.Value: grads,
    ld.Normalise: lambda made: [total_norm(tensor_norms(grads(made)))],
}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("rule", CLIPPING_RULES, ids=repr)
def test_limits_are_met(rule, seed, spread):
    made = parameters(seed, spread=spread)
    clip(rule, made)
    if rule.relative:
        norms = unit_norms if rule.by_unit else tensor_norms
        for w, g in zip(norms(made), norms(grads(made)), strict=True):
            assert (g <= rule.clip_factor * w.clamp(min=rule.eps) * (1 + 1e-12)).all()
    else:
        assert all((x.abs() <= 0.3 * (1 + 1e-12)).all() for x in BOUNDS[type(rule)](made))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("rule", CLIPPING_RULES, ids=repr)
def test_clipping_twice_is_clipping_once(rule, seed):
    made = parameters(seed)
    clip(rule, made)
    once = grads(made)
    clip(rule, made)
    assert_close(grads(made), once, rtol=4e-6, atol=0)


@pytest.mark.parametrize("rule", KEEPING_DIRECTION, ids=repr)
def test_every_unit_keeps_its_direction(rule, device):
    made = parameters(5)
    before = grads(made)
    clip(rule, made)
    for old, new in zip(before, grads(made), strict=True):
        rows = (old.flatten(1), new.flatten(1)) if old.ndim > 1 else (old.view(1, -1), new.view(1, -1))
        assert_close(torch.cosine_similarity(*rows), torch.ones(len(rows[0]), dtype=torch.float64))
        assert (new.sign() == old.sign()).all()


@pytest.mark.parametrize("rule", SHRINKING, ids=repr)
def test_what_is_within_its_bound_is_not_touched(rule, device):
    made = parameters(spread=1e-7)
    before = grads(made)
    assert float(clip(rule, made)) == 0
    assert all(a.equal(b) for a, b in zip(grads(made), before, strict=True))


@pytest.mark.parametrize("rule", CLIPPING_RULES, ids=repr)
def test_the_length_of_a_gradient_over_all_bounds_is_forgotten(rule, device):
    """Clipped, g and 1000 g are the same; torch's 1e-6 below the fraction bar is felt at 1e-9 of g."""
    once, longer = parameters(spread=1e3), parameters(spread=1e6)
    clip(rule, once)
    clip(rule, longer)
    if not isinstance(rule, ld.Value):
        assert_close(grads(once), grads(longer), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", RELATIVE, ids=repr)
@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_adaptive_clipping_does_not_depend_on_the_units_of_weights_and_gradients(rule, scale, device):
    made, scaled = parameters(), parameters()
    with torch.no_grad():
        for p in scaled:
            p.mul_(scale)
            p.grad.mul_(scale)
    assert float(clip(rule, made)) == float(clip(rule, scaled)) > 0
    assert_close(grads(scaled), [scale * g for g in grads(made)])


def test_gradients_below_the_smallest_length_count_as_that_long():
    p = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))
    p.grad = torch.full((1, 4), 2.5e-7, dtype=torch.float64)
    clip_adaptively_([p], 0.01, 1e-5)
    assert float(p.grad.norm()) == pytest.approx(5e-7 * 1e-7 / 1e-6)


def test_zero_weights_still_learn():
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    clip_adaptively_([p], 0.01, 1e-3)
    assert_close(p.grad.norm(dim=1), torch.full((4,), 1e-5))


def test_a_normalised_zero_gradient_stays_zero(device):
    made = parameters()
    for p in made:
        p.grad.zero_()
    clip(ld.Normalise(), made)
    assert not any(g.any() for g in grads(made))


@pytest.mark.parametrize("rule", [ld.GlobalNorm(), ld.Adaptive(), ld.UnitNorm(), ld.Value()], ids=repr)
def test_clipping_does_not_hide_what_is_not_a_number(rule, device):
    made = parameters()
    made[0].grad[2, 1] = math.nan
    clip(rule, made)
    assert made[0].grad[2, 1].isnan()
    assert not Gradients([made]).norm.isfinite()


@pytest.mark.parametrize("rule", CLIPPING_RULES, ids=repr)
def test_on_an_accelerator_nothing_waits(rule, monkeypatch):
    monkeypatch.setattr(scaling, "readable", lambda x: False)
    made = parameters()
    with SyncCounter() as counter:
        clip(rule, made)
        sanitize_(Gradients([made]))
    assert not counter.calls


def test_what_is_not_a_number_becomes_one_and_is_counted(device):
    made = parameters(dtype=torch.float32)
    expected = grads(made)
    for index, value, put in [(0, math.nan, 7.0), (1, math.inf, 50.0), (3, -math.inf, -60.0)]:
        made[index].grad.view(-1)[2] = value
        expected[index].view(-1)[2] = put
    gradients = Gradients([made])
    assert not gradients.norm.isfinite()
    assert int(sanitize_(gradients, 7.0, 50.0, -60.0)) == 3
    assert gradients.norm.isfinite()
    assert all(a.equal(b) for a, b in zip(grads(made), expected, strict=True))
    assert int(sanitize_(gradients)) == 0


def test_infinities_of_half_precision_stay_within_it():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    p.grad = torch.tensor([math.inf, -math.inf, 1.0], dtype=torch.float16)
    sanitize_(Gradients([[p]]))
    assert p.grad.tolist() == [65504.0, -65504.0, 1.0]


def test_channels_last_and_transposed_gradients(device):
    made = parameters()
    turned = copy.deepcopy(made)
    for p, q in zip(made, turned, strict=True):
        q.grad = p.grad.clone()
    turned[3].grad = turned[3].grad.contiguous(memory_format=torch.channels_last)
    turned[0].grad = turned[0].grad.T.contiguous().T
    for rule in (ld.Adaptive(0.1), ld.UnitNorm(0.3), ld.GlobalNorm(0.3)):
        clip(rule, made)
        clip(rule, turned)
        assert_close(grads(turned), grads(made))
    assert turned[3].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    "make",
    [
        ld.GlobalNorm,
        ld.ParameterGroupNorm,
        ld.ParameterNorm,
        ld.UnitNorm,
        ld.Value,
        ld.Adaptive,
        ld.Normalise,
        lambda eps: ld.Adaptive(eps=eps),
    ],
)
def test_bounds_that_bound_nothing_are_refused(make, bound):
    with pytest.raises(ValueError, match=r"bounds nothing: expected a number above 0"):
        make(bound)
