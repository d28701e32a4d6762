"""Representations: what they put out, that they come back, and what is saved."""

import pytest
import torch
from torch.testing import assert_close

import lightning_diffusion as ld


@pytest.fixture
def images():
    """Two channels of very different mean and deviation."""
    x = torch.randn(500, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([0.1, 0.4]).view(2, 1, 1) + torch.tensor([-0.7, 0.2]).view(2, 1, 1)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_standardised_data_have_zero_mean_and_the_deviation_asked_for(images, sigma_data):
    representation = ld.Standardize(sigma_data=sigma_data)
    assert representation.needs_measuring
    representation.measure(images.split(64))
    assert not representation.needs_measuring
    x = representation.encode(images).transpose(0, 1).flatten(1)
    assert_close(x.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    assert_close(x.std(1), torch.full((2,), sigma_data), rtol=1e-3, atol=0)


def test_decode_undoes_encode(images):
    for representation in (ld.Identity(), ld.Standardize([-0.7, 0.2], [0.1, 0.4])):
        assert_close(representation.decode(representation.encode(images)), images)


def test_measured_numbers_are_saved(images):
    measured, fresh = ld.Standardize(), ld.Standardize()
    measured.measure([images])
    fresh.load_state_dict(measured.state_dict())
    assert not fresh.needs_measuring
    assert torch.equal(fresh.encode(images), measured.encode(images))


def test_measuring_stops_after_enough_images(images):
    batches = iter([images[:100], images[100:200]])
    ld.Standardize(num_images=100).measure(batches)
    assert torch.equal(next(batches), images[100:200])


def test_bad_arguments_are_named(images):
    with pytest.raises(ValueError, match="expected both"):
        ld.Standardize(mean=[0.0])
    with pytest.raises(ValueError, match="std > 0"):
        ld.Standardize([0.0], [0.0])
    with pytest.raises(ValueError, match="Constant channels"):
        ld.Standardize().measure([torch.ones(4, 2, 3, 3)])


@pytest.mark.parametrize(
    "representation",
    [ld.Identity(), ld.Standardize([-0.4, 0.1], [0.7, 0.5], sigma_data=0.5)],
    ids=["as is", "std"],
)
def test_guesses_are_held_to_what_images_can_be(representation):
    """The nearest that an image encodes to, per element: what is inside stays, and no guess moves away from a truth."""
    x = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 3
    held = representation.hold(x)
    images = representation.decode(held)
    assert images.min() >= -1 - 1e-6
    assert images.max() <= 1 + 1e-6
    inside = representation.decode(x).abs() < 1
    assert_close(held[inside], x[inside])
    truth = representation.encode(torch.rand(64, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    assert ((held - truth).abs() <= (x - truth).abs() + 1e-5).all()


def test_unbounded_data_are_not_held():
    x = torch.full((2, 3), 9.0)
    assert torch.equal(ld.Identity(bounded=False).hold(x), x)
