"""Each datamodule yields the promised batches and holds the same out on every machine."""

import sys
import time
import warnings

import numpy as np
import pytest
import torch
from pictures import two_classes

from lightning_diffusion.analysis.information import GaussianMixture
from lightning_diffusion.datamodules import (
    DigitsDataModule,
    GaussianMixtureDataModule,
    ImageFolderDataModule,
)
from lightning_diffusion.datamodules.split import held_out

MIXTURE = GaussianMixture([0.3, 0.7], [[0.0, 0, 0, 0], [2.0, 0, -2, 1]], [0.1, 0.5])


@pytest.fixture
def folder(tmp_path):
    return two_classes(tmp_path)


DATA = {
    "digits": lambda folder: DigitsDataModule(batch_size=8),
    "large digits": lambda folder: DigitsDataModule(batch_size=8, image_size=32),
    "unlabelled digits": lambda folder: DigitsDataModule(batch_size=8, labels=False),
    "folder": lambda folder: ImageFolderDataModule(folder, 6, batch_size=8),
    "folder on disk": lambda folder: ImageFolderDataModule(
        folder, (4, 6), 8, 1, in_memory=False, num_workers=0
    ),
    "mixture": lambda folder: GaussianMixtureDataModule(MIXTURE, 8, samples_per_epoch=64, held_out=16),
    "mixture as images": lambda folder: GaussianMixtureDataModule(
        MIXTURE, 8, (1, 2, 2), samples_per_epoch=64, held_out=16, labels=True
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_batches_are_what_is_promised(name, folder):
    data = DATA[name](folder)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, *data.image_shape)
    assert batch["image"].dtype == torch.float32
    assert ("label" in batch) == (data.num_classes > 0)
    if data.num_classes:
        assert batch["label"].shape == (8,)
        assert batch["label"].dtype == torch.int64
        assert 0 <= batch["label"].min() <= batch["label"].max() < data.num_classes
    if "mixture" not in name:
        assert -1 <= batch["image"].min() < batch["image"].max() <= 1


@pytest.mark.parametrize("name", DATA)
def test_nothing_warns_and_the_global_generator_is_left_alone(name, folder):
    data = DATA[name](folder)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert loader == [] or next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_are_the_real_ones_each_used_once():
    data = DigitsDataModule()
    images = torch.cat([data.training_data().images, data.held_out_data().images])
    levels = (images + 1) * 8
    assert len(images) == 1797
    assert torch.equal(levels, levels.round())
    assert levels.unique().tolist() == list(range(17))
    from sklearn.datasets import load_digits

    assert levels.flatten(1).sum(1).sort().values.tolist() == sorted(load_digits().data.sum(1).tolist())


def test_a_fixed_share_of_each_class_is_held_out():
    data = DigitsDataModule(held_out=0.2)
    training, held = (part.labels.bincount() for part in (data.training_data(), data.held_out_data()))
    assert torch.equal(held, ((training + held) * 0.2).floor().long())
    assert torch.equal(
        data.held_out_data().images, DigitsDataModule(held_out=0.2, batch_size=3).held_out_data().images
    )


def test_enlarged_digits_are_the_small_ones():
    small, large = (DigitsDataModule(image_size=size).training_data().images for size in (8, 32))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert torch.corrcoef(torch.stack([small.flatten(), pooled.flatten()]))[0, 1] > 0.97


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-diffusion\[digits\]'"):
        DigitsDataModule().training_data()


def test_names_alone_rank_who_is_held_out():
    names = [f"{index}.png" for index in range(200)]
    before = set(np.flatnonzero(held_out(names[:100], [0] * 100, 0.2)))
    after = set(np.flatnonzero(held_out(names, [0] * 200, 0.1)))
    assert len(before) == len(after) == 20
    kept = np.argsort([names.index(n) for n in names])[:100]
    assert set(kept) & after <= before


def test_in_memory_batches_cost_little():
    """A tenth of a millisecond or so on a quiet machine; the bound leaves room for a busy one."""
    loader = DigitsDataModule().train_dataloader()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        count = sum(1 for _ in loader)
        times.append((time.perf_counter() - start) / count)
    assert min(times) < 5e-4


REFUSED = {
    "batch_size": (lambda folder: DigitsDataModule(batch_size=0), r"batch_size=0, expected at least 1"),
    "large batch": (
        lambda folder: ImageFolderDataModule(folder, 8, 64).train_dataloader(),
        r"found 24 training images, expected at least the 64 .*lower batch_size",
    ),
    "digit size": (lambda folder: DigitsDataModule(image_size=28), r"image_size=28, expected 8, 16 or 32"),
    "channels": (
        lambda folder: ImageFolderDataModule(folder, 8, channels=4),
        r"channels=4, expected 3 .* or 1",
    ),
    "share": (
        lambda folder: ImageFolderDataModule(folder, 8, held_out=1.0),
        r"held_out=1\.0, expected a share",
    ),
    "mixture shape": (
        lambda folder: GaussianMixtureDataModule(MIXTURE, image_shape=(1, 3, 3)),
        r"image_shape=\(1, 3, 3\), of 9 numbers, expected one of 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused(name, folder):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(folder)


def test_mixture_samples_never_repeat_and_have_its_moments():
    data = GaussianMixtureDataModule(MIXTURE, 1000, samples_per_epoch=10_000, labels=True)
    loader, x, label = data.train_dataloader(), [], []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            x.append(batch["image"])
            label.append(batch["label"])
    x, label = torch.cat(x).double(), torch.cat(label)
    assert len(x.unique(dim=0)) == 20_000
    for k, (mean, std, weight) in enumerate(zip(MIXTURE.means, MIXTURE.stds, MIXTURE.weights, strict=True)):
        own = x[label == k]
        assert len(own) / len(x) == pytest.approx(weight.item(), abs=4 * (0.25 / len(x)) ** 0.5)
        assert torch.allclose(own.mean(0), mean, atol=4 * std.item() / len(own) ** 0.5)
        assert torch.allclose(own.std(0), std, rtol=4 / (2 * len(own)) ** 0.5)


def test_a_mixture_sample_does_not_depend_on_how_it_is_asked_for():
    stream = GaussianMixtureDataModule(MIXTURE).training_data()
    together = stream.__getitems__([5000, 3, 1023, 1024, 3])["image"]
    alone = torch.stack([stream[number]["image"] for number in (5000, 3, 1023, 1024, 3)])
    assert torch.equal(together, alone)


def test_training_and_held_out_samples_differ(monkeypatch):
    """Also under seed 0; the held-out ones are the same in every run."""
    data = GaussianMixtureDataModule(MIXTURE)
    held = data.held_out_data()[0]["image"]
    assert not torch.equal(data.training_data()[0]["image"], held)
    training = data.training_data()[0]["image"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(data.training_data()[0]["image"], training)
    assert torch.equal(data.held_out_data()[0]["image"], held)
