"""Stable targets: the exact posterior over the references, unbiased at every size, less varied, never mixed."""

import itertools

import lightning as L
import pytest
import torch
from cases import SCHEDULES
from foreign import QUIET
from small_module import fit, module
from torch import nn
from torch.testing import assert_close
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.stable_targets import References

POINTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEVELS = ld.EDMSchedule().at(torch.tensor([14.0, 4.0, 1.0, 0.0, -2.0, -9.0], dtype=torch.float64))


def draws(n, seed=1, dimensions=3):
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(x0, noise, level, references, label=None, stable=None):
    stable = stable or ld.StableTarget()
    return stable.posterior(x0, noise, level, references, label)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_target_is_the_exact_denoiser_of_the_reference_set(schedule):
    """A finite set is a mixture of points, whose denoiser is known by another route."""
    level = schedule(torch.tensor([0.02, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))
    noise = draws(6)
    x_t = level.diffuse(POINTS, noise)
    exact = GaussianMixture([1 / 6] * 6, POINTS, [0.0] * 6).denoise(x_t, level)
    x_bar, eps_bar = targets(POINTS, noise, level, References(POINTS))
    assert_close(x_bar, exact, atol=1e-9, rtol=1e-9)
    assert_close(level.diffuse(x_bar, eps_bar), x_t, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_target_is_unbiased_for_every_number_of_references(size):
    """E[x_bar | x_t] = E[x_0 | x_t], averaged over all reference sets that hold x_0 and the posterior of the whole."""
    level = ld.EDMSchedule().at(torch.tensor([0.3], dtype=torch.float64))
    x_t = draws(1, seed=2)
    whole = GaussianMixture([1 / 6] * 6, POINTS, [0.0] * 6)
    posterior = (-(x_t - POINTS).square().sum(1) / (2 * level.sigma**2)).softmax(0)
    mean = torch.zeros(3, dtype=torch.float64)
    for own, x0 in enumerate(POINTS):
        others = [i for i in range(6) if i != own]
        subsets = list(itertools.combinations(others, size - 1))
        for subset in subsets:
            references = References(POINTS[[own, *subset]])
            noise = (x_t - x0) / level.sigma
            mean += posterior[own] / len(subsets) * targets(x0[None], noise, level, references)[0][0]
    assert_close(mean, whole.denoise(x_t, level)[0])


def test_references_without_the_true_sample_would_be_biased():
    """What `check` refuses: a target from two samples that lack x_0 is not that of three with it."""
    level = NoiseLevel(torch.ones(1).double(), torch.full((1,), 2.0).double())
    lacking, holding = (
        targets(POINTS[:1], draws(1), level, References(references))[0]
        for references in (POINTS[1:3], POINTS[:3])
    )
    assert (lacking - holding).norm() > 0.3


@pytest.mark.parametrize("dimensions", [2, 64])
def test_the_gradient_keeps_its_mean_and_loses_variance(dimensions):
    mixture = GaussianMixture([0.5, 0.5], [[-0.4] * dimensions, [0.4] * dimensions], [0.1, 0.2])
    network = nn.Linear(dimensions, dimensions).double()

    class Net(nn.Module):
        def forward(self, x, c_noise):
            return network(x)

    def gradients(stable):
        objective = ld.EDM(stable_target=stable)
        found = []
        for seed in range(200):
            x0 = mixture.sample(64, torch.Generator().manual_seed(seed))
            network.zero_grad()
            objective.loss(Net(), x0, key=ld.RandomKey(seed)).loss.backward()
            found.append(network.weight.grad.flatten().clone())
        return torch.stack(found)

    plain, stable = gradients(None), gradients(ld.StableTarget())
    difference = stable - plain
    z = difference.mean(0) / (difference.std(0) / 200**0.5)
    assert z.abs().max() < 5
    assert z.square().mean() < 1.5
    assert stable.var(0).sum() < plain.var(0).sum()


def test_labels_are_never_mixed_and_dropped_ones_see_all():
    label, null = torch.tensor([0, 0, 1, 1, 2, 2]), 3
    references = References(POINTS, label, null)
    level, noise = LEVELS._replace(sigma=torch.full((6,), 50.0).double()), draws(6)
    x_bar, _ = targets(POINTS, noise, level, references, torch.tensor([0, 1, 3, 1, 2, 3]))
    for row, group in {0: [0, 1], 2: range(6), 3: [2, 3], 4: [4, 5]}.items():
        chosen = POINTS[list(group)]
        x_t = level.diffuse(POINTS, noise)[row : row + 1]
        exact = GaussianMixture([1 / len(chosen)] * len(chosen), chosen, [0.0] * len(chosen))
        assert_close(x_bar[row], exact.denoise(x_t, NoiseLevel(*(p[:1] for p in level)))[0])


def test_chunks_change_nothing():
    noise = draws(6)
    whole = targets(POINTS, noise, LEVELS, References(POINTS))
    for rows in (1, 4, 5):
        in_chunks = targets(POINTS, noise, LEVELS, References(POINTS), stable=ld.StableTarget(chunk=6 * rows))
        assert_close(in_chunks, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_ends_of_the_axis_are_finite(dtype):
    """sigma = 0 keeps x_0 and its noise, alpha = 0 gives the mean of all."""
    level = NoiseLevel(torch.tensor([1.0, 1.0, 0.0]).to(dtype), torch.tensor([0.0, 1e-6, 1.0]).to(dtype))
    x0, noise = POINTS[:3].to(dtype), draws(3).to(dtype)
    x_bar, eps_bar = targets(x0, noise, level, References(x0))
    assert_close(x_bar, torch.stack([x0[0], x0[1], x0.mean(0)]))
    assert_close(eps_bar, noise)


def test_repeated_samples_in_float32_share_the_weight():
    x0 = POINTS[:1].float().repeat(4, 1) * 30
    x_bar, eps_bar = targets(
        x0, draws(4).float(), NoiseLevel(*(p[:4].float() for p in LEVELS)), References(x0)
    )
    assert torch.equal(x_bar, x0)
    assert torch.equal(eps_bar, draws(4).float())


def test_validation_keeps_the_plain_loss():
    objective, x0 = ld.EDM(stable_target=ld.StableTarget()), POINTS.float()
    net = ld.UNet([3, 1, 1], channels=8, num_blocks=1, attention_levels=())
    args = (net.eval(), x0.reshape(6, 3, 1, 1), None, ld.RandomKey(1))
    assert not torch.equal(objective.loss(*args).loss, ld.EDM().loss(*args).loss)
    assert torch.equal(objective.eval().loss(*args).loss, ld.EDM().loss(*args).loss)


def test_extra_samples_are_references_only():
    net = nn.Identity()
    net.forward = lambda x, c_noise: torch.zeros_like(x)
    x0 = 0.5 * draws(64)
    report = ld.EDM(stable_target=ld.StableTarget(extra=48)).loss(net, x0)
    assert report.per_sample.shape == (16,)
    with pytest.raises(ValueError, match=r"batch of 64.*extra=64.*raise the loader's batch_size"):
        ld.EDM(stable_target=ld.StableTarget(extra=64)).loss(net, x0)


def stable_module(**kwargs):
    return module(objective=ld.EDM(stable_target=ld.StableTarget(**kwargs)))


def test_the_whole_training_set_is_remembered_encoded_and_not_saved(tmp_path):
    model = stable_module(reference_size=2000)
    trainer = fit(model)
    stable = model.objective.stable_target
    data = trainer.datamodule.training_data()
    assert_close(stable.x0, model.representation.encode(data.images))
    assert torch.equal(stable.label, data.labels)
    assert not [name for name in model.state_dict() if "stable" in name]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ld.DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.objective.stable_target.reference_size == 2000


def test_a_reference_set_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"more than 1000 training samples.*StableTarget\(extra=...\)"):
        fit(stable_module(reference_size=1000))


def test_augmented_data_are_refused():
    images = torch.rand(64, 1, 8, 8) * 2 - 1

    class Flipped(TensorDataset):
        def __getitem__(self, index):
            sign = 1 if torch.rand(()) < 0.5 else -1
            return sign * images[index], torch.tensor(0)

    data = DataLoader(Flipped(images), batch_size=16)
    with pytest.raises(ValueError, match=r"training samples that are not among the references.*augmented"):
        L.Trainer(**{**QUIET, "max_steps": 2, "enable_checkpointing": False}).fit(
            stable_module(reference_size=64), data
        )


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_own_sample_is_found_in_any_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert fit(stable_module(reference_size=2000), precision=precision).global_step == 3
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(32)), WeightedRandomSampler([1.0] * 64, 64), RandomSampler(range(64), True)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_loaders_of_a_part_or_of_repeated_samples_are_refused(sampler):
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    data = DataLoader(TensorDataset(images, torch.zeros(64).long()), batch_size=16, sampler=sampler)
    with pytest.raises(
        ValueError, match=r"Sampler; expected one that deals out its whole dataset.*extra=..."
    ):
        L.Trainer(**{**QUIET, "max_steps": 2, "enable_checkpointing": False}).fit(
            stable_module(reference_size=64), data
        )


def test_references_without_labels_are_refused():
    stable = ld.StableTarget(reference_size=8)
    with pytest.raises(ValueError, match=r"has no references yet.*remember"):
        stable.references(POINTS, {}, None)
    stable.remember([(POINTS, None)])
    with pytest.raises(ValueError, match="references have none: they would be mixed"):
        stable.references(POINTS, {"label": torch.zeros(6)}, 3)
    with pytest.raises(ValueError, match=r"also conditioned on \['context'\]"):
        stable.references(POINTS, {"context": POINTS}, None)


@pytest.mark.parametrize(
    "arguments", [{"reference_size": -1}, {"extra": -2}, {"reference_size": 9, "extra": 9}]
)
def test_sizes_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=r"either a reference_size.*or a number of extra samples"):
        ld.StableTarget(**arguments)
