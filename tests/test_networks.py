"""Networks: shapes, a start at zero, conditions that matter."""

import pytest
import torch
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.networks.base import Reweighted
from lightning_diffusion.networks.embeddings import NoiseEmbedding


def small(shape=(1, 8, 8), **arguments):
    torch.manual_seed(0)
    return ld.UNet(shape, channels=8, num_blocks=1, **arguments)


def woken(network):
    """The network with every zero-initialised weight set off zero, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 7, 13), (2, 5, 1), (1, 28, 28)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_any_height_and_width(shape, multipliers):
    network = woken(small(shape, multipliers=multipliers))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    assert network(x, torch.zeros(2)).shape == x.shape


def test_output_starts_at_zero_and_every_parameter_gets_a_gradient_in_the_end():
    network = small(num_classes=3)
    x, c_noise, label = torch.randn(4, 1, 8, 8), torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 3])
    assert not network(x, c_noise, label).any()
    woken(network)(x, c_noise, label).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_noise_level_and_label_matter_and_samples_do_not_mix():
    network = woken(small(num_classes=3)).eval()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)).expand(3, -1, -1, -1)
    out = network(x, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 1, 0]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert_close(network(x[:1], torch.zeros(1), torch.tensor([0])), out[:1])


def test_no_label_is_the_null_label():
    network = woken(small(num_classes=3)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert_close(network(x, torch.zeros(2)), network(x, torch.zeros(2), torch.full((2,), 3)))


@pytest.mark.parametrize(
    "c_noise", [torch.linspace(-2.5, 2.5, 100), torch.arange(1000.0)], ids=["log sigma", "timestep"]
)
def test_embedding_tells_all_levels_apart(c_noise):
    features = NoiseEmbedding(32)(c_noise)
    nearest = (torch.cdist(features, features) + 100 * torch.eye(len(c_noise))).min()
    assert nearest > 0.05


def test_embedding_is_float32_in_a_bfloat16_network():
    """bfloat16 has 8 bits: 999 and 1000 would be one."""
    network = small().bfloat16()
    assert network.noise(torch.tensor([999.0])).dtype == torch.float32
    assert network(torch.zeros(1, 1, 8, 8).bfloat16(), torch.zeros(1)).dtype == torch.bfloat16


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="expected an even number"):
        ld.UNet((1, 8, 8), channels=9)


def test_reweighted_runs_other_weights_and_leaves_the_network_alone():
    network, other = woken(small()), woken(small())
    other.head.bias.data += 1
    before = {name: p.clone() for name, p in network.named_parameters()}
    x = torch.randn(2, 1, 8, 8)
    assert_close(
        Reweighted(network, dict(other.named_parameters()))(x, torch.zeros(2)), other(x, torch.zeros(2))
    )
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
