"""Gradients know their norms: computed once, of what is there now."""

from __future__ import annotations

import math

import pytest
import torch
from made_gradients import SHAPES, grads, parameters
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion import norms
from lightning_diffusion.gradients import Gradients, clip_adaptively_, sanitize_
from lightning_diffusion.norms import tensor_norms, total_norm, unit_norms


def test_norms_are_computed_once_and_anew_after_clipping(monkeypatch):
    computed = []
    monkeypatch.setattr(norms, "tensor_norms", lambda x: computed.append(len(x)) or tensor_norms(x))
    made = parameters()
    gradients = Gradients([made[:3], made[3:]])
    part = gradients.without({id(made[0])})
    before = float(gradients.norm), float(part.norm), [float(group.norm) for group in gradients.by_group()]
    assert computed[0] == len(made)
    assert sum(computed) == len(made)
    assert before[0] == pytest.approx(math.hypot(*before[2]))
    ld.GlobalNorm(0.1)(part)
    assert float(part.norm) == pytest.approx(0.1, rel=1e-4)
    assert float(gradients.norm) == pytest.approx(math.hypot(0.1, float(made[0].grad.norm())), rel=1e-4)


def read_once(monkeypatch):
    """Numbers of tensors in every list whose norms are computed."""
    read = []
    monkeypatch.setattr(norms, "unit_norms", lambda *x: read.extend(map(len, x)) or unit_norms(*x))
    monkeypatch.setattr(norms, "tensor_norms", lambda x: read.append(len(x)) or tensor_norms(x))
    return read


RULES = [ld.Adaptive(0.3), ld.UnitNorm(0.3), ld.Adaptive(1e9)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_norms_of_units_make_all_others_and_stay_known_when_units_are_clipped(rule, monkeypatch):
    made = parameters()
    exact = tensor_norms(grads(made))
    read = read_once(monkeypatch)
    gradients = Gradients([made[:3], made[3:]], by_unit=True)
    assert_close(gradients.norms, exact)
    part = gradients.without({id(made[3])})
    rule(part)
    clipped = float(part.norm), float(gradients.norm)
    assert read == [len(made)] + [len(part)] * rule.relative  # its weights
    assert_close(gradients.norms, tensor_norms(grads(made)), rtol=1e-13, atol=0)
    parts = [p.grad for p in made if p is not made[3]]
    assert_close(clipped, tuple(float(total_norm(tensor_norms(g))) for g in (parts, grads(made))))


def test_norms_of_clipped_units_that_cannot_be_known_are_computed_anew():
    made = parameters(dtype=torch.float32)
    made[0].grad[2] = 1e30  # its norm overflows, its clipped elements are zero
    gradients = Gradients([made], by_unit=True)
    assert not gradients.norm.isfinite()
    ld.UnitNorm(0.3)(gradients)
    assert gradients.norms[0].isfinite()
    made[3].grad[0, 0, 0, 0] = torch.nan
    gradients.forget()
    ld.UnitNorm(0.3)(gradients)
    assert [bool(norm.isfinite()) for norm in gradients.norms] == [True] * 3 + [False] + [True] * 2


def test_a_norm_that_is_within_its_bound_stays_known(monkeypatch):
    gradients = Gradients([parameters()])
    read = read_once(monkeypatch)
    for _ in range(2):
        ld.GlobalNorm(1e9)(gradients)
        sanitize_(gradients)
    assert read == [len(gradients)]


def test_parameters_without_gradients_are_left_out():
    made = parameters()
    made[1].grad = None
    assert len(Gradients([made])) == len(SHAPES) - 1
    assert float(ld.GlobalNorm()(Gradients([[made[1]]]))) == 0
    assert float(clip_adaptively_(iter(made))) > 0


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo; only dense ones.*Write sparse=False"):
        Gradients([embedding.parameters()])


def test_every_norm_is_that_of_its_elements():
    made = parameters()
    for p, whole, units in zip(
        made, tensor_norms(grads(made)), unit_norms(*[[g] for g in grads(made)]), strict=True
    ):
        assert_close(whole, p.grad.square().sum().sqrt())
        assert_close(units, p.grad.flatten(1).square().sum(1).sqrt() if p.ndim > 1 else whole.view(1))
        assert_close(total_norm(list(units)), whole)


def test_norms_of_several_types_of_numbers():
    mixed = parameters(dtype=torch.float32)[:2] + parameters(dtype=torch.bfloat16)[2:]
    exact = sum(float(g.double().square().sum()) for g in grads(mixed)) ** 0.5
    assert float(Gradients([mixed]).norm) == pytest.approx(exact, rel=1e-6)
