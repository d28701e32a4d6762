"""The stability study: emulated bfloat16 is autocast's, what is recorded is there, what counts as divergence."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.networks.magnitudes import UnitWeight
from lightning_diffusion.networks.transformer import SelfAttention

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import stability
import stability_networks as networks
import stability_training as study
from bfloat16_products import Bfloat16Products

ROUNDING = 2.0**-8
"""Half the distance between neighbouring bfloat16 numbers, over the number."""


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autocast():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def gradients(function, tensors, emulated):
    """The output, and the gradients of a fixed sum of it."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    with Bfloat16Products() if emulated else torch.enable_grad(), autocast():
        output = function(*leaves)
    (output.float() * draw(*output.shape, seed=9)).sum().backward()
    return [output, *(x.grad for x in leaves)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.linear, [(7, 24), (5, 24), (5,)]),
        (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 6, 5, 5), (4, 6, 3, 3), (4,)]),
        (torch.matmul, [(3, 4, 8), (3, 8, 6)]),
        (lambda a, b: a @ b, [(4, 8), (8, 6)]),
        (F.scaled_dot_product_attention, [(2, 2, 5, 8)] * 3),
    ],
    ids=["linear", "convolution", "matmul", "operator", "attention"],
)
def test_each_product_is_autocast_s_up_to_the_order_of_the_sum(function, shapes):
    """Types too. A sum in another order is rounded to the same number or, rarely, to a neighbour."""
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    for emulated, real in zip(
        gradients(function, tensors, True), gradients(function, tensors, False), strict=True
    ):
        assert emulated.dtype == real.dtype
        assert_close(emulated, real, rtol=2 * ROUNDING, atol=2 * ROUNDING * real.abs().max().item())


def woken(network):
    """The network with every zero-initialised weight set off zero, as training would."""
    for seed, p in enumerate(network.parameters()):
        if not p.any():
            p.data = 0.1 * draw(*p.shape, seed=seed)
    return network


NETWORKS = {
    "dit": lambda: ld.DiT((1, 8, 8), 2, ld.DiTSize(16, 2, 2)),
    "unet": lambda: ld.UNet((1, 8, 8), 8, num_blocks=1),
    "magnitude_preserving": lambda: ld.MagnitudePreservingUNet(
        (1, 8, 8), 8, (1, 2), 1, (1,), head_channels=16
    ),
}


def error(found, expected):
    """|found - expected| / |expected|, of all tensors together."""
    distance = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return (distance / sum(b.double().square().sum() for b in expected)).sqrt().item()


def trained(network, precision):
    """The output and the gradients of all parameters, under DiffusionPrecision or in float32."""
    module = ld.DiffusionModule(network, ld.EDM())
    plugin = ld.DiffusionPrecision("bf16-mixed")
    if precision != "float32":
        plugin.convert_module(module)
    x, c_noise = draw(4, 1, 8, 8), torch.linspace(-1, 1, 4)
    with Bfloat16Products() if precision == "emulated" else torch.enable_grad():
        output = network(x, c_noise)
    network.zero_grad()
    (output.float() * draw(4, 1, 8, 8, seed=3)).sum().backward()
    plugin.teardown()
    return [output.detach()], [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_computes_what_it_would_under_autocast(name):
    """Outputs to rounding; gradients are nearer to autocast's than those are to float32's.

    Autocast on a CPU sums some gradients (of biases and gains) in bfloat16, which no other hardware does.
    """
    torch.manual_seed(0)
    network = woken(NETWORKS[name]())
    found = {precision: trained(network, precision) for precision in ("float32", "bfloat16", "emulated")}
    (full, full_gradients), (real, real_gradients), (emulated, emulated_gradients) = found.values()
    assert error(emulated, real) < ROUNDING / 2 < error(real, full)
    assert error(emulated_gradients, real_gradients) < 0.75 * error(real_gradients, full_gradients)
    assert error(emulated_gradients, full_gradients) > ROUNDING / 2


def test_outside_of_autocast_nothing_is_rounded():
    x, w = draw(3, 8), draw(4, 8, seed=1)
    with Bfloat16Products():
        assert torch.equal(F.linear(x, w), x @ w.T)


def test_recorded_logits_and_activations_are_those_of_a_hand_computation():
    torch.manual_seed(0)
    attention, x = SelfAttention(8, 2, qk_norm=False), draw(3, 5, 8)
    with study.Recorder([attention]) as recorder:
        output = attention(x)
    largest = 0.0
    q, k, _ = attention.qkv(x).detach().split(8, dim=-1)
    for sample in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            logits = q[sample, :, head] @ k[sample, :, head].T / 2
            largest = max(largest, logits.abs().max().item())
    assert recorder.logits == [pytest.approx(largest, rel=1e-5)]
    assert recorder.activations == [pytest.approx(output.square().mean().sqrt().item(), rel=1e-5)]
    attention(x)
    assert len(recorder.activations) == 1


def test_normalised_queries_and_keys_bound_what_is_recorded():
    """|q| = |k| = sqrt(d) makes |q . k| / sqrt(d) at most sqrt(d); without it logits follow the weights squared."""
    for qk_norm in (True, False):
        torch.manual_seed(0)
        attention = SelfAttention(16, 2, qk_norm)
        attention.qkv.weight.data *= 30
        with study.Recorder([]) as recorder:
            attention(draw(2, 6, 16))
        assert (recorder.logits[0] <= math.sqrt(8) * 1.001) == qk_norm


@pytest.mark.parametrize(
    ("end", "expected"), [(0.4, False), (1.0, False), (1.01, True), (math.inf, True), (math.nan, True)]
)
def test_a_training_diverges_that_ends_above_its_start_or_nowhere(end, expected):
    assert study.diverged(1.0, end) is expected


def test_without_weight_normalisation_a_longer_weight_counts():
    layer, x = UnitWeight(6, 4, 3), draw(2, 6, 5, 5)
    for kind, factor in ((UnitWeight, 1.0), (networks.FreeWeight, 2.0)):
        layer.__class__ = kind
        with torch.no_grad():
            before = layer(x)
            layer.weight.mul_(2)
            assert_close(layer(x), factor * before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("images", [8, 32])
@pytest.mark.parametrize(("network", "variant"), stability.NETWORKS)
def test_the_largest_network_has_64_times_the_parameters_of_the_smallest(network, variant, images):
    runs = [networks.Run(images, network, variant, size, 0.004) for size in networks.SIZES]
    counts = [sum(p.numel() for p in networks.network_of(run).parameters()) for run in runs]
    assert 60 < counts[-1] / counts[0] < 72
    assert all(2 < b / a < 4 for a, b in pairwise(counts))


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    """Nor rates above one that diverged."""
    monkeypatch.setattr(stability, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(stability, "LAYERS", tmp_path / "layers.csv")
    runs = [networks.Run(8, "dit", "plain", 1, rate) for rate in (0.004, 0.016, 0.064)]
    monkeypatch.setitem(stability.STAGES, "sizes", lambda: runs)
    asked = []

    def train(run):
        asked.append(run)
        return {"end": 2.0, "diverged": int(run.rate == 0.016)}, study.Trace()

    monkeypatch.setattr(stability, "train", train)
    stability.main(["run", "sizes"])
    stability.main(["run", "sizes"])
    assert asked == runs[:2]
    assert [stability.key_of(row) for row in stability.rows(tmp_path / "rows.csv")] == asked
