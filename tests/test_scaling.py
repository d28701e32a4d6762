"""Multiplying in place: everything, or only what has a factor."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lightning_diffusion import scaling
from lightning_diffusion.scaling import scale_, scale_each_, scale_units_

SHAPES = [(5,), (), (30, 4), (12, 2, 3, 3), (0, 3), (4, 2)]
FORMS = {"whole tensors": (10**9, True), "units picked out": (0, True), "no branches": (0, False)}


@pytest.fixture(params=FORMS, autouse=True)
def form(request, monkeypatch):
    picking, readable = FORMS[request.param]
    monkeypatch.setattr(scaling, "PICKING", picking)
    monkeypatch.setattr(scaling, "readable", lambda x: readable)


@pytest.mark.parametrize("over", [[], [0], [1, 2, 17, 33, 47], list(range(0, 48, 9)), list(range(48))])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_unit_is_multiplied_by_its_factor(over, channels_last):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    if channels_last:
        tensors[3] = tensors[3].contiguous(memory_format=torch.channels_last)
    factors = torch.ones(48, dtype=torch.float64)
    factors[over] = torch.rand(len(over), dtype=torch.float64)
    expected, left = [], factors.tolist()
    for x in tensors:
        units = [u * left.pop(0) for u in x] if x.ndim > 1 else [x * left.pop(0)]
        expected.append(torch.stack(units) if x.ndim > 1 and units else units[0] if units else x.clone())
    assert not left
    scale_units_(tensors, factors)
    assert_close(tensors, expected, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_one_factor_for_all_or_for_each(factor):
    torch.manual_seed(0)
    together = [torch.randn(shape) for shape in SHAPES]
    each = [x.clone() for x in together]
    expected = [x * factor for x in together]
    scale_(together, torch.tensor(factor))
    scale_each_(each, torch.full((len(SHAPES),), factor))
    assert_close(together, expected, rtol=0, atol=0)
    assert_close(each, expected, rtol=0, atol=0)
