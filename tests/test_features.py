"""Extractors get the images that pictures show, frozen, and say at once what they lack."""

import urllib.error

import numpy as np
import pytest
import torch
from measured import PIXELS, digits, images_of
from pictures import two_classes
from torch import nn
from torch.nn.functional import interpolate
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch_fidelity import feature_extractor_inceptionv3 as inception

import lightning_diffusion as ld
from lightning_diffusion import classifier_features, real_images
from lightning_diffusion.datamodules import ImageFolderDataModule
from lightning_diffusion.features import extract
from lightning_diffusion.plots import to_pixels
from lightning_diffusion.real_images import RealImages, to_8_bits

QUICK = ld.ClassifierFeatures(steps=60)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loader(images, labels=None, batch_size=4):
    parts = [images] if labels is None else [images, labels]
    collate = None if labels is not None else lambda rows: torch.stack([row[0] for row in rows])
    return DataLoader(TensorDataset(*parts), batch_size=batch_size, shuffle=True, collate_fn=collate)


def test_images_become_the_pixels_that_pictures_show():
    images = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.array_equal(to_8_bits(images).permute(0, 2, 3, 1).numpy(), to_pixels(images))
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_8_bits(levels), levels)
    for shift in (-0.49, 0.49):
        assert torch.equal(to_8_bits((levels.float() + shift).clamp(0, 255) / 127.5 - 1), levels)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 4, 4), 255.0), r"found images in 255\.\.255, expected -1\.\.1: divide by 127\.5"),
        (torch.full((2, 1, 4, 4), torch.nan), r"found NaN or infinity in images \[0, 1\]"),
    ],
)
def test_real_images_of_another_range_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        to_8_bits(images)


def test_every_image_comes_once_in_the_same_order_whatever_the_loader():
    images = torch.arange(20).reshape(20, 1, 1, 1).expand(20, 1, 2, 2) / 10 - 1
    small, large = (RealImages(loader(images, batch_size=size)) for size in (3, 8))
    assert_close(images_of(small.training()), images, atol=0.51 / 127.5, rtol=0)
    assert torch.equal(images_of(small.training()), images_of(large.training()))
    assert small.content.digest == large.content.digest


def test_the_hash_knows_pixels_labels_and_which_part_is_held_out():
    images, labels = torch.zeros(20, 1, 2, 2), torch.arange(20) % 2
    other = images.clone()
    other[7, 0, 1, 1] = 2 / 127.5
    several = [
        RealImages(loader(images, labels)),
        RealImages(loader(other, labels)),
        RealImages(loader(images, labels.flip(0))),
        RealImages(loader(images)),
        RealImages(loader(images[:12], labels[:12]), [loader(images[12:], labels[12:])]),
        RealImages(loader(images.reshape(20, 1, 1, 4), labels)),
    ]
    assert len({real.content.digest for real in several}) == len(several)
    assert torch.equal(several[4].content.labels, labels[:12])
    assert several[3].content.labels is None


def test_of_very_many_images_a_fixed_choice_is_taken(monkeypatch):
    monkeypatch.setattr(real_images, "MOST", 15)
    images = torch.arange(100).reshape(100, 1, 1, 1) / 50 - 1
    first, again = (images_of(RealImages(loader(images)).training()) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) == 15
    assert first.max() > 0.3, "not merely the first ones"


class Huge(TensorDataset):
    """So many that a list of them would not fit anywhere."""

    def __len__(self):
        return 10**15


def test_of_more_images_than_a_list_could_hold_a_fixed_choice_is_taken():
    one, again = (real_images._chosen(Huge()) for _ in range(2))
    assert torch.equal(one, again)
    assert len(one.unique()) == real_images.MOST
    assert one.min() >= 0
    mean, error = 0.5e15, 1e15 / (12 * len(one)) ** 0.5
    assert abs(one.double().mean() - mean) < 4 * error


class Chunked(TensorDataset):
    """10,000 chunks of 1,000."""

    chunk_sizes = (1000,) * 10_000

    def __len__(self):
        return 10**7


@pytest.mark.parametrize(("number", "chunks"), [(50, 64), (50_000, 64), (100_000, 100)])
def test_of_data_in_chunks_few_chunks_are_read(monkeypatch, number, chunks):
    monkeypatch.setattr(real_images, "MOST", number)
    one, again = (real_images._chosen(Chunked()) for _ in range(2))
    assert torch.equal(one, again)
    assert len(one.unique()) == number
    touched = (one // 1000).unique()
    assert len(touched) <= chunks
    assert touched.max() > 5000, "not merely the first ones"
    assert number < 10_000 or len(touched) == chunks


def test_too_few_images_and_streams_are_refused():
    with pytest.raises(ValueError, match="found 3 training images, expected 10 or more"):
        RealImages(loader(torch.zeros(3, 1, 2, 2)))

    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1, 2, 2)

    with pytest.raises(ValueError, match="found a loader of Stream, expected one of a dataset that can be"):
        RealImages(DataLoader(Stream()))


def test_an_empty_image_folder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"empty.*image"):
        ImageFolderDataModule(tmp_path / "empty", 8)


def test_image_folders_are_read(tmp_path):
    data = ImageFolderDataModule(two_classes(tmp_path), 8, batch_size=4, held_out=0.25)
    real = RealImages(data.train_dataloader(), [data.val_dataloader()])
    assert (real.num_training, real.num_held_out) == (18, 6)
    assert real.content.labels.tolist() == [0] * 9 + [1] * 9


def test_the_classifier_is_deterministic_cached_and_leaves_random_numbers_alone(cache, monkeypatch):
    real = digits()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = QUICK.load(real)
    assert torch.equal(torch.get_rng_state(), state)
    for path in cache.iterdir():
        path.unlink()
    torch.manual_seed(4)
    again = QUICK.load(real)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    monkeypatch.setattr(classifier_features, "_trained", lambda *_: pytest.fail("trained again"))
    cached = QUICK.load(digits(batch_size=10))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), cached.parameters(), strict=True))
    held_out = list(real.held_out())
    hits = torch.cat([cached.logits(batch.images).argmax(1) == batch.labels for batch in held_out])
    assert hits.float().mean() > 0.9
    assert not any(p.requires_grad for p in cached.parameters())
    assert extract(cached, held_out[0].images, QUICK).shape == (64, 64)


def test_another_seed_is_another_classifier():
    real = digits()
    one, other = (ld.ClassifierFeatures(steps=1, seed=seed).load(real) for seed in (0, 1))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_large_images_are_averaged_down_to_32_pixels():
    images = torch.randint(256, (3, 3, 64, 96), generator=torch.Generator().manual_seed(0)).byte()
    assert_close(classifier_features._shrunk(images), interpolate(images.float(), (32, 32), mode="area"))


@pytest.mark.parametrize(("labels", "found"), [(None, "none"), (torch.zeros(20).long(), "one class")])
def test_a_classifier_needs_classes(labels, found):
    with pytest.raises(ValueError, match=f"learn from labels, and the data have {found}. Use Inception"):
        QUICK.load(RealImages(loader(torch.zeros(20, 1, 4, 4), labels)))


def no_network(*_, **__):
    raise urllib.error.URLError("Name or service not known")


def test_no_network_for_the_inception_weights_is_said_with_both_ways_out(monkeypatch):
    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    with pytest.raises(OSError, match=r"Name or service.*use ClassifierFeatures.*weights_path of a copy"):
        ld.InceptionFeatures().load(None)


@pytest.mark.parametrize(("content", "said"), [(None, "does not exist"), (b"nonsense", "holds no Inception")])
def test_wrong_weights_are_named(tmp_path, content, said):
    path = tmp_path / "inception.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=rf"inception\.pth {said}.*ClassifierFeatures"):
        ld.InceptionFeatures(weights_path=str(path)).load(None)


def test_inception_takes_grey_images_of_any_size(monkeypatch):
    """With random parameters: the published ones cannot be had here."""
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    network = ld.InceptionFeatures(64).load(None)
    images = torch.randint(256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    features = extract(network, images, ld.InceptionFeatures(64))
    assert features.shape == (2, 64)
    assert_close(features, extract(network, images.expand(-1, 3, -1, -1), ld.InceptionFeatures(64)))
    assert (ld.InceptionFeatures().name, ld.InceptionFeatures(64).name) == ("inception", "inception64")


def test_a_network_of_ones_own_gets_normalised_resized_images():
    images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    own = ld.ModuleFeatures(nn.Flatten(), "own", mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    scaled = images.double().expand(-1, 3, -1, -1) / 255
    expected = (scaled - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1.0, 2, 4])[
        :, None, None
    ]
    assert_close(extract(own.load(None), images, own).double(), expected.flatten(1), atol=1e-6, rtol=1e-6)
    larger = ld.ModuleFeatures(nn.Flatten(), "own", input_size=16, channels=1)
    assert extract(larger.load(None), images, larger).shape == (4, 256)
    assert "resized to 16 x 16" in repr(larger)


def test_an_extractor_of_another_input_size_says_so():
    linear = ld.ModuleFeatures(nn.Sequential(nn.Flatten(), nn.Linear(49, 5)), "linear", channels=1)
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 8\).*Give.*input_size"):
        extract(linear.load(None), torch.zeros(2, 1, 8, 8).byte(), linear)
    maps = ld.ModuleFeatures(nn.Identity(), "maps")
    with pytest.raises(ValueError, match=r"puts out shape \(2, 3, 8, 8\), not \(N, F\)"):
        extract(maps.load(None), torch.zeros(2, 1, 8, 8).byte(), maps)


def test_names_can_be_logged():
    assert PIXELS.name == "pixels"
    with pytest.raises(ValueError, match="found name='dino v2', expected letters, digits and _"):
        ld.ModuleFeatures(nn.Flatten(), "dino v2")
    with pytest.raises(ValueError, match=r"found layer=100, expected one of \(64, 192, 768, 2048\)"):
        ld.InceptionFeatures(100)
