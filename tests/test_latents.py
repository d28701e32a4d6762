"""Latents on disk: they are those of the images, memory-mapped, drawn anew in every epoch, refused when not whole."""

import pickle
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from foreign import QUIET
from safetensors.torch import load_file, save_file
from small_autoencoder import Gaussian, rotation
from small_module import fit, module, network
from torch.testing import assert_close
from torch.utils.data import TensorDataset

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule, LatentsDataModule, write_latents
from lightning_diffusion.datamodules.base import InMemory

SHARD_BYTES = 2**16


class Few(DigitsDataModule):
    """The first 256 digits to train on, 40 held out."""

    def training_data(self):
        whole = super().training_data()
        return InMemory(whole.images[:256], whole.labels[:256])

    def held_out_data(self):
        whole = super().held_out_data()
        return InMemory(whole.images[:40], whole.labels[:40])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Of a rotation, in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("rotation")
    write_latents(Few(), rotation(), folder, batch_size=48, shard_bytes=SHARD_BYTES // 4)
    return folder


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Of an autoencoder with a posterior; not to be changed."""
    folder = tmp_path_factory.mktemp("random")
    write_latents(Few(), Gaussian(), folder, shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_latents_are_those_of_the_images_in_any_order(written):
    data, code = LatentsDataModule(written), rotation()
    assert len([shard for shard in data.shards if shard.part == "training"]) > 2
    assert (data.image_shape, data.num_classes) == ((4, 4, 4), 10)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:50].tolist()
    for part, whole in (("training_data", Few().training_data()), ("held_out_data", Few().held_out_data())):
        latents = getattr(data, part)()
        chosen = [index for index in order if index < len(whole)]
        assert len(latents) == len(whole)
        found = latents.__getitems__(chosen)
        assert torch.equal(found["label"], whole.labels[chosen])
        assert_close(code.decode(found["image"]), whole.images[chosen], rtol=0, atol=1e-5)


def test_batches_are_those_of_the_images(written):
    """The same order and labels, so that results compare; none of the global generator."""
    before = torch.get_rng_state()
    loaders = Few(64).train_dataloader(), LatentsDataModule(written, 64).train_dataloader()
    for epoch in (0, 3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for images, latents in zip(*loaders, strict=True):
            assert torch.equal(images["label"], latents["label"])
            assert_close(rotation().encode(images["image"]), latents["image"], rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    assert "label" not in next(iter(LatentsDataModule(written, labels=False).train_dataloader()))


def test_files_are_mapped_not_read(written):
    data = LatentsDataModule(written).training_data()
    data.__getitems__([0, 255])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(written / "training-00000.safetensors") in maps.read_text()
    assert len(pickle.dumps(data)) < 5_000
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[7]["image"], data[7]["image"])


def draws(folder, epoch, batch_size=256, **options):
    data = LatentsDataModule(folder, **options).training_data()
    numbers = torch.arange(256) + epoch * 256
    return torch.cat([data.__getitems__(part.tolist())["image"] for part in numbers.split(batch_size)])


def test_a_posterior_is_drawn_from_anew_in_every_epoch(random, monkeypatch):
    mean = 2 * Few().training_data().images + 1
    assert_close(draws(random, 1, sample=False), mean)
    first, second = ((draws(random, epoch) - mean) / 0.3 for epoch in (0, 1))
    for noise in (first, second):
        assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
        assert noise.var().item() == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5)
    correlation = (first * second).mean()
    assert abs(correlation) < 4 / first.numel() ** 0.5
    assert torch.equal(draws(random, 0), draws(random, 0, batch_size=100)), (
        "whatever is beside it in the batch"
    )
    before = draws(random, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(draws(random, 0), before)


def test_held_out_draws_are_always_the_same(random, monkeypatch):
    (before,) = LatentsDataModule(random).val_dataloader()
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (after,) = LatentsDataModule(random).val_dataloader()
    assert torch.equal(before["image"], after["image"])
    assert not torch.equal(before["image"], 2 * Few().held_out_data().images + 1)


def on_disk(code, shape, **arguments):
    representation = ld.LatentRepresentation(code, encoded=True, **arguments)
    return module(network=network(shape=shape), representation=representation, sampler=ld.Heun(3))


def test_training_on_disk_is_training_on_images(written):
    def end(representation, data):
        model = module(
            network=network(shape=(4, 4, 4)),
            representation=representation,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            learning_rate=ld.WarmupConstant(0),
        )
        fit(model, data, steps=6, max_epochs=-1)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), model

    images, first = end(ld.LatentRepresentation(rotation()), Few(64))
    latents, second = end(ld.LatentRepresentation(rotation(), encoded=True), LatentsDataModule(written, 64))
    start = torch.cat([p.detach().flatten() for p in network(shape=(4, 4, 4)).parameters()])
    assert (images - latents).norm() < 1e-4 * (images - start).norm()
    assert_close(first.representation.scale, second.representation.scale)
    assert_close(first.sample(4), second.sample(4), rtol=0, atol=1e-3)


def test_a_stopped_run_goes_on_exactly(random, tmp_path):
    """Stopped in the midst of the second epoch, of four micro-batches, two to a step."""

    def run(steps, resume=None):
        model, data = on_disk(Gaussian(), (1, 8, 8)), LatentsDataModule(random, 64)
        settings = {"max_steps": steps, "accumulate_grad_batches": 2, "enable_checkpointing": False}
        trainer = L.Trainer(**QUIET, **settings)
        trainer.fit(model, datamodule=data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.state_dict()

    straight = run(6)
    run(3)
    resumed = run(6, tmp_path / "3.ckpt")
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())


def test_a_dataset_will_do(tmp_path):
    images = Few().training_data().images[:20]
    (shard,) = write_latents(TensorDataset(images, torch.arange(20) % 3), rotation(), tmp_path)
    data = LatentsDataModule(tmp_path, batch_size=4)
    assert (shard.size, data.num_classes, data.val_dataloader()) == (20, 3, [])
    (unlabelled,) = write_latents(InMemory(images), rotation(), tmp_path / "unlabelled")
    assert unlabelled.writing.num_classes == 0


def test_what_is_measured_on_images_is_measured_and_kept(tmp_path):
    write_latents(Few(), ld.PatchPCA(), tmp_path)
    kept = ld.PretrainedAutoencoder(ld.PatchPCA(), str(tmp_path / "autoencoder.safetensors"))
    found = LatentsDataModule(tmp_path).training_data().__getitems__(range(256))["image"]
    assert_close(kept.decode(found), Few().training_data().images, rtol=0, atol=1e-5)
    fit(on_disk(kept, (4, 4, 4)), LatentsDataModule(tmp_path, 64), steps=1)


def truncate(folder):
    path = folder / "training-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(folder, source, name="training-00001.safetensors"):
    tensors = load_file(folder / name)
    save_file(tensors, folder / name, source)


def other_writing(folder):
    write_latents(Few(), rotation(), folder / "new", shard_bytes=SHARD_BYTES // 4)
    shutil.copy(folder / "new" / "training-00001.safetensors", folder)


def other_autoencoder(folder):
    write_latents(Few(), rotation(3), folder / "new", shard_bytes=SHARD_BYTES // 4)
    shutil.copy(folder / "new" / "training-00001.safetensors", folder)


BROKEN = {
    "truncated": (truncate, r"training-00001.safetensors is no whole shard"),
    "empty": (
        lambda f: (f / "training-00001.safetensors").write_bytes(b""),
        "training-00001.* no whole shard",
    ),
    "missing": (
        lambda f: (f / "training-00001.safetensors").unlink(),
        r"training-00001.safetensors is missing, with it 1 of \d shards",
    ),
    "foreign": (lambda f: rewrite(f, {"format": "pt"}), "training-00001.* was not written by write_latents"),
    "renamed": (
        lambda f: (f / "training-00001.safetensors").rename(f / "training-00009.safetensors"),
        "training-00009.* says that it is training-00001",
    ),
    "other writing": (other_writing, "training-00001.* is of another writing than"),
    "other autoencoder": (other_autoencoder, "training-00001.* is of another autoencoder than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_latents_that_are_not_whole_are_refused_by_name(name, copy):
    spoil, message = BROKEN[name]
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        LatentsDataModule(copy)


def test_a_stopped_writing_is_refused_and_can_be_replaced(tmp_path):
    class Stops(Gaussian):
        calls = 0

        def encode(self, x):
            self.calls += 1
            if self.calls > 3:
                raise KeyboardInterrupt
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        write_latents(Few(), Stops(), tmp_path, shard_bytes=SHARD_BYTES // 2)
    with pytest.raises(ValueError, match="is missing, with it"):
        LatentsDataModule(tmp_path)
    with pytest.raises(FileExistsError, match="holds latents already"):
        write_latents(Few(), Gaussian(), tmp_path)
    write_latents(Few(), Gaussian(), tmp_path, overwrite=True)
    assert len(LatentsDataModule(tmp_path).training_data()) == 256
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_absent_folder_is_named(tmp_path):
    for folder, message in ((tmp_path / "absent", "absent does not exist"), (tmp_path, "holds no latents")):
        with pytest.raises(FileNotFoundError, match=message):
            LatentsDataModule(folder)


def test_latents_hold_to_their_autoencoder(written):
    with pytest.raises(ValueError, match=r"hash to \w{32}; those of the representation hash to \w{32}"):
        fit(on_disk(Gaussian(), (4, 4, 4)), LatentsDataModule(written))
    images = module(network=network(shape=(4, 4, 4)), representation=ld.LatentRepresentation(rotation()))
    with pytest.raises(ValueError, match=r"set representation\.init_args\.encoded: true"):
        fit(images, LatentsDataModule(written))


def test_images_that_cannot_be_encoded_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"divide by 127\.5"):
        write_latents(InMemory(Few().training_data().images * 100 + 100), rotation(), tmp_path)
    with pytest.raises(TypeError, match="found list, expected a ResumableDataModule or a dataset"):
        write_latents([1, 2], rotation(), tmp_path)
