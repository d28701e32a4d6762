"""DiT: rotary positions at any size, normalised queries and keys, published sizes, what is refused."""

from dataclasses import replace

import pytest
import torch
from published import published
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.networks.transformer import (
    SelfAttention,
    SwiGLU,
    gelu_layers,
    rotate,
    rotations,
    sine_positions,
)

MODERN, ORIGINAL = ld.DiTOptions(), ld.DiTOptions.original()
OPTIONS = [
    MODERN,
    ORIGINAL,
    *(replace(ORIGINAL, **{name: True}) for name in ("qk_norm", "rotary", "rms_norm", "swiglu")),
]


def small(options=MODERN, shape=(2, 8, 8), **arguments):
    torch.manual_seed(0)
    return ld.DiT(shape, **{"patch_size": 2, "size": ld.DiTSize(16, 2, 2), "options": options, **arguments})


def woken(network):
    """The network with every zero-initialised weight set off zero, as training would."""
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if not p.any():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return network


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_starts_at_zero_and_every_parameter_gets_a_gradient_in_the_end(options):
    network = small(options, num_classes=3)
    x, c_noise, label = draw(4, 2, 8, 8), torch.linspace(-1, 1, 4), torch.tensor([0, 1, 2, 3])
    assert not network(x, c_noise, label).any()
    output = woken(network)(x, c_noise, label)
    assert output.shape == x.shape
    output.square().sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_blocks_start_as_nothing():
    network = small()
    tokens = draw(2, 16, 16)
    rotation = rotations(4, 4, 8, tokens.device)
    for block in network.blocks:
        assert torch.equal(block(tokens, draw(2, 16), rotation), tokens)


def test_noise_level_and_label_matter_and_no_label_is_the_null_label():
    network = woken(small(num_classes=3)).eval()
    x = draw(1, 2, 8, 8).expand(3, -1, -1, -1)
    out = network(x, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 1, 0]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert_close(network(x, torch.zeros(3)), network(x, torch.zeros(3), torch.full((3,), 3)))
    assert_close(network(x[:1], torch.zeros(1), torch.tensor([0])), out[:1])


def test_rotated_products_depend_on_the_distance_alone():
    """And lengths stay: float64."""
    q, k = draw(8).double(), draw(8, seed=1).double()
    angles = rotations(7, 9, 8, q.device).double().unflatten(0, (7, 9))
    turned_q, turned_k = rotate(q.expand(7, 9, 8), angles), rotate(k.expand(7, 9, 8), angles)
    assert_close(turned_q.norm(dim=-1), q.norm().expand(7, 9))
    products = torch.einsum("abi,cdi->abcd", turned_q, turned_k)
    assert_close(products[:5, :6, :5, :6], products[2:, 3:, 2:, 3:], rtol=1e-5, atol=1e-5)
    assert products.std() > 0.1 * products.abs().mean()


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (12, 6), (2, 2)])
def test_an_image_of_equal_patches_is_treated_alike_at_every_size(size):
    """Rotary positions tell tokens apart by distance only, and equal tokens need not be told apart."""
    network = woken(small())
    patch = draw(1, 2, 2, 2)
    height, width = size
    output = network(patch.tile(1, 1, height // 2, width // 2), torch.zeros(1))
    expected = network(patch, torch.zeros(1))
    assert_close(output, expected.tile(1, 1, height // 2, width // 2), rtol=1e-4, atol=1e-5)


def test_rotary_positions_tell_rows_from_columns_and_order():
    network = woken(small())
    for block in network.blocks:
        block.attention.qkv.weight.data *= 5
    x = draw(1, 2, 8, 8)
    output = network(x, torch.zeros(1))
    for moved in (lambda y: y.mT, lambda y: y.unflatten(2, (4, 2)).flip(2).flatten(2, 3)):
        assert (moved(network(moved(x).contiguous(), torch.zeros(1))) - output).abs().max() > 1e-3


def test_a_trained_size_is_only_a_default_with_rotary_positions():
    """Another resolution and aspect ratio through objective and sampler."""
    module = ld.DiffusionModule(woken(small(num_classes=3)), ld.EDM())
    noise = draw(2, 2, 12, 20)
    label = torch.tensor([0, 1])
    with torch.no_grad():
        drawn = ld.Euler(3)(
            module.denoiser({"label": label}, ld.ClassifierFree(2.0)), noise, module.objective.schedule
        )
    assert drawn.shape == noise.shape
    assert drawn.isfinite().all()


def test_sine_positions_are_those_that_were_published():
    found = published("dit_patch2")
    assert_close(sine_positions(4, 4, 32), found.state_dict["pos_embed"], rtol=0, atol=1e-6)


def test_normalised_queries_and_keys_do_not_grow_with_their_weights():
    torch.manual_seed(0)
    tokens = draw(2, 16, 16)
    grown = {}
    for qk_norm in (True, False):
        attention = SelfAttention(16, 2, qk_norm)
        torch.nn.init.zeros_(attention.qkv.bias)
        before = attention(tokens)
        attention.qkv.weight.data[:32] *= 100
        grown[qk_norm] = (attention(tokens) - before).abs().max().item()
    assert grown[True] < 1e-3 < 1e-2 < grown[False]


def test_gated_layers_have_as_many_weights_as_plain_ones():
    for width in (16, 384, 1152):
        plain, gated = (sum(p.numel() for p in make(width).parameters()) for make in (gelu_layers, SwiGLU))
        assert gated == pytest.approx(plain, rel=0.3 if width == 16 else 0.01)


@pytest.mark.parametrize(
    ("size", "patch_size", "millions"),
    [
        (ld.DiTSize.small(), 2, 33),
        (ld.DiTSize.base(), 2, 130),
        (ld.DiTSize.base(), 8, 131),
        (ld.DiTSize.large(), 2, 458),
        (ld.DiTSize.extra_large(), 2, 675),
    ],
    ids=str,
)
def test_published_sizes(size, patch_size, millions):
    """Peebles & Xie 2023, Table 4: latents of ImageNet-256, noise and variance."""
    options = ld.DiTOptions.original(learned_variance=True)
    with torch.device("meta"):
        network = ld.DiT((4, 32, 32), patch_size, size, num_classes=1000, options=options)
        modern = ld.DiT((4, 32, 32), patch_size, size, num_classes=1000)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert abs(count - millions) < 0.6
    assert sum(p.numel() for p in modern.parameters()) / 1e6 == pytest.approx(count, rel=0.01)


def test_a_learned_variance_is_left_out_of_the_output():
    network = woken(small(ld.DiTOptions.original(learned_variance=True)))
    x = draw(2, 2, 8, 8)
    everything = network.respond(x, torch.zeros(2))
    assert everything.shape == (2, 4, 8, 8)
    assert torch.equal(network(x, torch.zeros(2)), everything[:, :2])


def sampled_at(shape, options=MODERN):
    return lambda: small(options)(torch.zeros(1, *shape), torch.zeros(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.DiTSize(16, 2, 3), r"width=16, depth=2, num_heads=3\); expected num_heads that divides"),
        (lambda: small(shape=(2, 9, 8)), r"9 x 8 for patch_size=2; expected .* multiples"),
        (lambda: small(size=ld.DiTSize(12, 2, 2)), "heads of 6 features.* multiple of 4"),
        (lambda: small(ORIGINAL, size=ld.DiTSize(18, 2, 2)), "tokens of 18 features.* multiple of 4"),
        (sampled_at((2, 7, 8)), "7 x 8 for patch_size=2"),
        (sampled_at((2, 16, 8), ORIGINAL), r"8 x 4 patches; sine positions were made for 4 x 4.*rotary=True"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rotations_are_computed_in_float32_for_bfloat16_tokens():
    """A token far to the right: in bfloat16 its angle would be wrong by a tenth of a turn."""
    x = draw(1, 8).bfloat16()
    angles = rotations(1, 200, 8, x.device)[-1:]
    exact = rotate(x.double(), angles.double())
    assert rotate(x, angles).dtype == torch.bfloat16
    assert_close(rotate(x, angles).double(), exact, rtol=4e-3, atol=4e-3)
