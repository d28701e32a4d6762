"""Figures of samples whose quality is known; the cache; samples that do not depend on who draws them."""

import math

import pytest
import torch
from measured import PIXELS, Drawing, compared, digits, images_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.feature_cache import cached
from lightning_diffusion.generative import (
    FIGURES,
    Draws,
    RealFeatures,
    diverged,
    drawn_features,
    few_samples,
    figures,
    get_ready,
    logged_names,
    real_features,
)
from lightning_diffusion.metrics import frechet_distance
from lightning_diffusion.sharing import Share


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        return compared()


def test_figures_tell_copies_fresh_data_and_noise_apart(real):
    ready, features = real
    training, held_out = (images_of(part) for part in (digits().training(), digits().held_out()))
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sources = {"copies": training, "fresh": held_out, "noise": noise}
    found = {
        name: figures(features, drawn_features(Drawing(images), Draws(500), ready, None))
        for name, images in sources.items()
    }
    frechet = {name: values["frechet"] for name, values in found.items()}
    assert frechet["copies"] < frechet["fresh"] < 0.1 * frechet["noise"]
    assert found["copies"]["near_copies"] == 1
    assert found["fresh"]["near_copies"] < 0.1
    assert found["noise"]["near_copies"] == found["noise"]["precision"] == 0
    assert found["copies"]["precision"] == 1
    assert 0.01 < found["noise"]["near_copies_held_out"] < 0.1
    assert tuple(found["fresh"]) == FIGURES


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_that_share_the_drawing_get_what_one_gets(real, world_size):
    """Each draws equally often, as sharded networks need."""
    ready, _ = real
    draws, labels = Draws(1000, seed=5), torch.arange(10)
    modules = [Drawing(images_of(digits().training()), num_classes=10) for _ in range(world_size + 1)]
    alone = drawn_features(modules[-1], draws, ready, labels)
    parts = []
    for rank in range(world_size):
        keep = lambda x: (parts.append(x), torch.stack([x] * world_size))[1]  # noqa: E731
        drawn_features(modules[rank], draws, ready, labels, Share(rank, world_size, keep))
    together = drawn_features(
        modules[0], draws, ready, labels, Share(0, world_size, lambda _: torch.stack(parts))
    )
    assert torch.equal(together, alone)
    assert len({len(module.calls) for module in modules[1:-1]}) == 1


def test_the_seed_decides_and_labels_come_in_the_proportions_of_the_data(real):
    ready, _ = real
    module, labels = Drawing(images_of(digits().training()), 3), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
    draw = lambda seed: drawn_features(module, Draws(600, seed=seed), ready, labels)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    drawn = torch.cat([call["condition"]["label"] for call in module.calls])
    share = drawn.bincount().double() / len(drawn)
    assert_close(share, torch.tensor([1, 2, 5]).double() / 8, atol=3 * (0.25 / len(drawn)) ** 0.5, rtol=0)


def test_sampler_guidance_and_weights_reach_the_module(real):
    module = Drawing(images_of(digits().training()))
    draws = Draws(10, "ema:slow", ld.Euler(3), ld.ClassifierFree(2.0))
    drawn_features(module, draws, real[0], None)
    drawn_features(module, Draws(10), real[0], None)
    asked = {"weights": "ema:slow", "sampler": ld.Euler(3), "guidance": ld.ClassifierFree(2.0)}
    assert module.calls[0] == {"num": 10, "condition": None, **asked}
    assert module.calls[1] == {"num": 10, "condition": None, "weights": "online"}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -300.0])
def test_what_is_no_image_is_counted_and_every_figure_is_nan(real, broken):
    ready, features = real
    images = torch.zeros(8, 1, 8, 8)
    images[3, 0, 2, 2] = broken
    drawn = drawn_features(Drawing(images), Draws(200), ready, None)
    bad = int(drawn.isnan().any(1).sum())
    assert 0 < bad < 200
    assert f"{bad} of 200 samples hold NaN, infinity or values beyond 2" in diverged(drawn)
    assert all(math.isnan(value) for value in figures(features, drawn).values())
    assert diverged(torch.zeros(3, 3)) is None


def test_a_decoder_may_overshoot_as_pictures_do(real):
    over, cut = (
        drawn_features(Drawing(torch.full((4, 1, 8, 8), value)), Draws(10), real[0], None)
        for value in (1.2, 1.0)
    )
    assert torch.equal(over, cut)


def test_images_of_another_shape_than_the_real_ones_are_refused(real):
    with pytest.raises(ValueError, match=r"drawn images of shape \(1, 16, 16\) and real ones of \(1, 8, 8\)"):
        drawn_features(Drawing(torch.zeros(4, 1, 16, 16)), Draws(10), real[0], None)


@pytest.mark.parametrize(
    ("samples", "images", "said"),
    [
        (64, 500, "found 64 samples for 64 features: a covariance is singular"),
        (65, 30, "found 30 real images for 64 features"),
        (20, 30, "found 20 samples and 30 real images for 64 features"),
        (65, 500, None),
    ],
)
def test_fewer_samples_than_features_are_told_in_numbers(samples, images, said):
    found = few_samples(RealFeatures(torch.zeros(images, 64), torch.zeros(0, 64)), samples)
    assert found is None if said is None else said in found


def test_pairwise_figures_take_a_choice_of_many_and_frechet_takes_all(real, monkeypatch):
    ready, features = real
    drawn = drawn_features(Drawing(images_of(digits().held_out())), Draws(300), ready, None)
    monkeypatch.setattr("lightning_diffusion.generative.PAIRWISE", 100)
    assert figures(features, drawn)["frechet"] == frechet_distance(features.training, drawn).item()


def test_names_say_extractor_number_and_what_was_asked_for():
    name = lambda draws: next(iter(logged_names({"frechet": 0.0}, PIXELS, draws)))  # noqa: E731
    assert name(Draws(2000)) == "metrics/frechet_pixels_2000"
    assert name(Draws(50, "ema:0.05")) == "metrics/frechet_pixels_50_ema_0.05"
    assert name(Draws(50, "runs/a.safetensors")) == "metrics/frechet_pixels_50_a.safetensors"
    assert (
        name(Draws(50, "online", guidance=ld.ClassifierFree(1.5)))
        == "metrics/frechet_pixels_50_online_guidance1.5"
    )


def never(*_):
    raise AssertionError("computed again")


def test_real_features_are_computed_once(cache, monkeypatch):
    _, first = compared()
    (path,) = cache.iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata()["content"] in path.name
    monkeypatch.setattr("lightning_diffusion.generative._features", never)
    _, again = compared()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("change", ["data", "settings", "parameters"])
def test_of_other_data_or_another_network_they_are_computed_anew(change):
    _, first = compared()
    real = digits(held_out=0.3) if change == "data" else digits()
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64))
    mean = [0.5] if change == "settings" else [0.0]
    network = linear if change == "parameters" else torch.nn.Flatten()
    extractor = ld.ModuleFeatures(network, "pixels", channels=1, mean=mean, std=[1.0])
    other = real_features(get_ready(extractor, real), real)
    expected = torch.cat([get_ready(extractor, real)(batch.images) for batch in real.training()])
    assert torch.equal(other.training, expected)
    assert first.training.shape != other.training.shape or not torch.equal(first.training, other.training)


class Counting(torch.nn.Module):
    """Flat pixels to a power, which no parameter and no setting tells."""

    def __init__(self, power):
        super().__init__()
        self.power, self.calls = power, 0

    def forward(self, x):
        self.calls += 1
        return x.flatten(1) ** self.power


def test_a_network_whose_code_has_changed_never_gets_the_features_of_the_old_one(monkeypatch):
    def features(network):
        real = digits()
        ready = get_ready(ld.ModuleFeatures(network, "own", channels=1, mean=[0.0], std=[1.0]), real)
        network.calls = 0
        return real_features(ready, real).training, network.calls

    first, computed = features(Counting(1.0))
    again, probed = features(Counting(1.0 + 1e-7))
    other, anew = features(Counting(1.01))
    assert torch.equal(first, again)
    assert (probed, anew) == (1, computed), "the probe alone, and everything"
    assert computed > 2
    assert_close(other, first**1.01)
    monkeypatch.setattr("lightning_diffusion.feature_cache.version", lambda _: "another")
    assert features(Counting(1.01))[1] == computed, "another version of this package"


@pytest.mark.parametrize("harm", ["other content", "other values", "cut off"])
def test_a_cache_from_other_data_or_damaged_is_never_trusted(cache, harm):
    _, right = compared()
    (path,) = cache.iterdir()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    if harm == "other content":
        save_file(tensors, path, {**said, "content": "0" * 32})
    elif harm == "other values":
        save_file({**tensors, "training": tensors["training"] + 1}, path, said)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    _, again = compared()
    assert torch.equal(again.training, right.training)
    assert torch.equal(load_file(path)["training"], right.training), "mended"


def test_a_folder_that_cannot_be_written_to_is_only_warned_of(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be written to.*set LIGHTNING_DIFFUSION_CACHE"):
        assert cached("x", "0", lambda: {"a": torch.ones(2)})["a"].tolist() == [1, 1]
