"""Magnitudes that are preserved: by every part, at the start, over the training; published sizes."""

import math

import pytest
import torch
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.networks.base import Reweighted
from lightning_diffusion.networks.magnitude_preserving import CosineAttention, DecoderBlock, EncoderBlock
from lightning_diffusion.networks.magnitudes import (
    FourierFeatures,
    UnitWeight,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)


def small(shape=(1, 8, 8), **arguments):
    torch.manual_seed(0)
    settings = {
        "channels": 8,
        "multipliers": (1, 2),
        "num_blocks": 1,
        "attention_levels": (1,),
        "head_channels": 8,
    }
    return ld.MagnitudePreservingUNet(shape, **{**settings, **arguments})


def woken(network):
    """Gains set off zero, as training would."""
    for name, p in network.named_parameters():
        if name.endswith("gain"):
            p.data.fill_(0.5)
    return network


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def magnitude(x):
    return x.square().mean().sqrt().item()


def test_silu_keeps_the_magnitude_of_a_normal_variable():
    """By quadrature, float64."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    power = torch.trapezoid(mp_silu(x).square() * density, x)
    assert power.sqrt().item() == pytest.approx(1, abs=1e-3)


def test_sums_and_joins_keep_the_magnitude_of_what_is_uncorrelated():
    a, b = draw(4, 24, 32, 32), draw(4, 8, 32, 32, seed=1)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert magnitude(mp_sum(a, a.roll(1, 1), t)) == pytest.approx(1, abs=0.01)
    joined = mp_cat(a, 1 * b)
    assert magnitude(joined) == pytest.approx(1, abs=0.01)
    shares = [part.square().sum().item() for part in joined.split([24, 8], dim=1)]
    assert shares[0] / shares[1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_layers_keep_the_magnitude_of_white_noise_whatever_the_length_of_their_weights(kernel):
    torch.manual_seed(0)
    layer = UnitWeight(32, 48, kernel)
    layer.weight.data *= torch.logspace(-1, 3, 48).reshape(-1, *(1,) * (layer.weight.ndim - 1))
    x = draw(2000, 32) if kernel == 0 else draw(8, 32, 34, 34)
    output = layer(x)
    inner = output if kernel == 0 else output[..., 1:-1, 1:-1]
    dims = [d for d in range(output.ndim) if d != 1]
    assert_close(inner.square().mean(dims).sqrt(), torch.ones(48), rtol=0.1, atol=0)
    assert magnitude(inner) == pytest.approx(1, abs=0.02)


def test_fourier_features_have_unit_magnitude_at_every_level():
    torch.manual_seed(0)
    features = FourierFeatures(4096)(torch.linspace(-2.5, 2.5, 21))
    assert_close(features.square().mean(1).sqrt(), torch.ones(21), rtol=0.05, atol=0)


def test_activations_start_with_unit_magnitude_in_every_block():
    """Zero padding and the spread of attention cost up to a tenth; nothing grows or vanishes with depth."""
    torch.manual_seed(0)
    network = ld.MagnitudePreservingUNet(
        (3, 16, 16), 32, (1, 1, 2), num_blocks=2, attention_levels=(), num_classes=10, head_channels=32
    ).eval()
    found = {}
    for name, part in network.named_modules():
        if isinstance(part, (EncoderBlock, DecoderBlock)):
            part.register_forward_hook(lambda _, __, out, name=name: found.update({name: magnitude(out)}))
    network.gain.data.fill_(1.0)
    with torch.no_grad():
        output = network(draw(8, 3, 16, 16), torch.linspace(-1, 1, 8), torch.arange(8))
    assert len(found) == 2 + 6 + 2 + 2 + 9
    assert all(0.8 < m < 1.1 for m in found.values()), found
    assert 0.7 < magnitude(output) < 1.3


def test_output_starts_at_zero_and_every_parameter_gets_a_gradient_in_the_end():
    network = small(num_classes=3)
    x, c_noise, label = draw(4, 1, 8, 8), torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 3])
    assert not network(x, c_noise, label).any()
    woken(network)(x, c_noise, label).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_keep_unit_norm_and_gradients_are_perpendicular_to_them():
    """After steps that are far too long, without the forced norm weights would be 30 times as long."""
    network = woken(small(num_classes=3))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x, c_noise, label = draw(4, 1, 8, 8), torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 3])
    layers = [layer for layer in network.modules() if isinstance(layer, UnitWeight)]
    for _ in range(5):
        optimizer.zero_grad()
        network(x, c_noise, label).square().mean().backward()
        for layer in layers:
            w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
            assert_close(w.square().mean(1), torch.ones(len(w)), rtol=2e-3, atol=0)
            assert ((w * g).sum(1).abs() <= 5e-3 * w.norm(dim=1) * g.norm(dim=1) + 1e-9).all()
        optimizer.step()


def test_outputs_do_not_depend_on_the_length_of_weights():
    """So nothing is lost by forcing it."""
    network = woken(small()).eval()
    x = draw(2, 1, 8, 8)
    before = network(x, torch.zeros(2))
    for layer in network.modules():
        if isinstance(layer, UnitWeight):
            layer.weight.data *= 50
    assert_close(network(x, torch.zeros(2)), before, rtol=0, atol=2e-3)
    network.normalize_()
    assert_close(network(x, torch.zeros(2)), before, rtol=0, atol=2e-3)


def test_attention_logits_are_bounded(monkeypatch):
    seen = []
    torch.manual_seed(0)
    attention = CosineAttention(16, heads=2)
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append((q, k)) or real(q, k, v),
    )
    attention(1000 * draw(2, 16, 4, 4))
    q, k = seen[0]
    assert (q @ k.mT / math.sqrt(8)).abs().max() <= math.sqrt(8) * (1 + 1e-5)


def test_evaluation_and_averages_leave_weights_as_they_are():
    network, x = small(), draw(2, 1, 8, 8)
    for p in network.parameters():
        p.data *= 3
    before = {name: p.clone() for name, p in network.named_parameters()}
    averages = {name: p.detach().clone() for name, p in before.items()}
    network.eval()(x, torch.zeros(2))
    Reweighted(network.train(), averages)(x, torch.zeros(2))
    with torch.no_grad():
        network(x, torch.zeros(2))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in averages.items())
    network(x, torch.zeros(2))
    assert not torch.equal(network.stem.weight, before["stem.weight"])


def test_a_second_forward_in_eval_mode_leaves_the_first_ones_gradients():
    network, x = woken(small()), draw(2, 1, 8, 8)
    first = network(x, torch.zeros(2))
    (first - network.eval()(x, torch.ones(2))).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    again = network.train()(x, torch.zeros(2))
    network(x, torch.zeros(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        again.sum().backward()


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 7, 13), (2, 5, 1)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 1, 2)])
def test_any_height_and_width(shape, multipliers):
    network = woken(small(shape, multipliers=multipliers, attention_levels=(0,))).eval()
    x = draw(2, *shape)
    assert network(x, torch.zeros(2)).shape == x.shape
    wider = draw(2, shape[0], shape[1] + 3, shape[2] + 2)
    assert network(wider, torch.zeros(2)).shape == wider.shape


def test_noise_level_and_label_matter_and_no_label_is_the_null_label():
    network = woken(small(num_classes=3)).eval()
    x = draw(1, 1, 8, 8).expand(3, -1, -1, -1)
    out = network(x, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 1, 0]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert_close(network(x, torch.zeros(3)), network(x, torch.zeros(3), torch.full((3,), 3)))
    assert_close(network(x[:1], torch.zeros(1), torch.tensor([0])), out[:1])


def test_normalising_nothing_gives_nothing():
    x = torch.zeros(2, 4, 3, requires_grad=True)
    normalize(x, (1,)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"head_channels=64 for 96 channels at level 1.*head_channels=32"):
        ld.MagnitudePreservingUNet((1, 8, 8), channels=48, multipliers=(1, 2), attention_levels=(1,))


@pytest.mark.parametrize(
    ("channels", "millions"),
    [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)],
    ids=["XS", "S", "M", "L", "XL", "XXL"],
)
def test_published_sizes(channels, millions):
    """Karras et al. 2024, Table 2: networks for latents of ImageNet-512."""
    with torch.device("meta"):
        network = ld.MagnitudePreservingUNet((4, 64, 64), channels, num_classes=1000)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
