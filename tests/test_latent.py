"""Training in the latents of a frozen autoencoder: what it puts out, that it stays frozen, what is saved."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from foreign import QUIET
from safetensors.torch import save_file
from small_autoencoder import Gaussian, drawn_elsewhere, images, rotation, trained_convolutional
from small_module import fit, module, network
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import lightning_diffusion as ld
from lightning_diffusion.callbacks import EMA
from lightning_diffusion.datamodules import DigitsDataModule


def latent_module(autoencoder=None, shape=(4, 4, 4), **arguments):
    representation = ld.LatentRepresentation(autoencoder or rotation(), **arguments)
    return module(network=network(shape=shape), representation=representation, sampler=ld.Heun(3))


def per_channel(x):
    return x.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("make", [rotation, trained_convolutional, Gaussian])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_what_is_trained_on_has_zero_mean_and_sigma_data_in_every_channel(make, sigma_data):
    representation = ld.LatentRepresentation(make(), sigma_data=sigma_data)
    assert representation.needs_measuring
    representation.measure(images().split(50))
    assert not representation.needs_measuring
    draws = [representation.draw(images(), ld.RandomKey(batch=number)) for number in range(8)]
    x = per_channel(torch.cat(draws))
    assert_close(x.mean(1), torch.zeros(len(x)), rtol=0, atol=2e-3 * sigma_data)
    assert_close(x.std(1), torch.full((len(x),), sigma_data), rtol=2e-3, atol=0)


def test_a_rotation_loses_nothing():
    representation = ld.LatentRepresentation(rotation())
    representation.measure([images()])
    held_out = DigitsDataModule().held_out_data().images
    assert_close(representation.decode(representation.encode(held_out)), held_out, rtol=0, atol=1e-5)


def test_principal_components_lose_the_variance_of_those_left_out():
    """Eckart and Young: the squared error per patch is the sum of the eigenvalues beyond."""
    data = images().double()
    patches = nn.functional.pixel_unshuffle(data, 2).transpose(0, 1).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(patches.cov(correction=0))
    for channels in (1, 2, 3):
        autoencoder = ld.PatchPCA(channels).double()
        autoencoder.measure(data.split(100))
        error = (autoencoder.decode(autoencoder.encode(data)) - data).square().mean() * 4
        assert_close(error, eigenvalues[: 4 - channels].sum())
        own = per_channel(autoencoder.encode(data)).cov(correction=0).reshape(channels, channels)
        assert_close(own, eigenvalues.flip(0)[:channels].diag())


def test_training_in_rotated_latents_is_training_on_rotated_data():
    """Two routes to one run: the representation encodes, or the data come encoded."""
    code = rotation()
    shift, scale = [0.1, 0.0, -0.1, 0.2], [0.4, 0.8, 1.2, 1.5]
    constants = [torch.tensor(c).view(4, 1, 1) for c in (shift, scale)]
    x = (code.encode(images()) - constants[0]) * constants[1]
    ends = []
    for representation, data in (
        (ld.LatentRepresentation(code, shift, scale), images()),
        (ld.Identity(bounded=False), x),
    ):
        model = module(
            network=network(0, (4, 4, 4)),
            representation=representation,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            learning_rate=ld.WarmupConstant(0),
        )
        trainer = L.Trainer(**{**QUIET, "max_steps": 4, "enable_checkpointing": False})
        trainer.fit(model, DataLoader(data, 64))
        ends.append(torch.cat([p.detach().flatten() for p in model.network.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network(0, (4, 4, 4)).parameters()])
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start).norm()


def test_a_trained_autoencoder_is_neither_trained_nor_averaged():
    """Batch norm's statistics would follow the data in train mode, dropout would make encoding random."""
    code = trained_convolutional()
    before = {name: value.clone() for name, value in code.state_dict().items()}
    model, ema = latent_module(code, (2, 4, 4)), EMA(0.5)
    fit(model, steps=5, callbacks=[ema])
    after = model.representation.autoencoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.train().representation.training
    assert not any(part.training for part in model.representation.autoencoder.modules())
    assert torch.equal(model.representation.encode(images()), model.representation.encode(images()))
    assert not model.representation.encode(images()).requires_grad
    assert all(name.startswith("network.") for name in model.averaged_parameters())
    assert all(name.startswith("network.") for name in ema.state_dict()["averages"]["ema"])
    optimized = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in model.representation.parameters()}


def test_draws_are_the_posterior_and_a_function_of_the_place_in_the_run():
    representation = ld.LatentRepresentation(Gaussian(), 0.0, 1.0)
    x, key = images(), ld.RandomKey(3, 1, 7)
    draw = representation.draw(x, key)
    assert torch.equal(draw, representation.draw(x, key))
    for other in (ld.RandomKey(3, 1, 8), ld.RandomKey(3, 2, 7), ld.RandomKey(3, 1, 7, rank=1, world_size=2)):
        assert not torch.equal(draw, representation.draw(x, other))
    assert_close(representation.encode(x), 2 * x + 1)
    noise, count = (draw - representation.encode(x)) / 0.3, x.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / count) ** 0.5)
    assert_close(representation.decode(representation.encode(x)), x)


class Returns(nn.Module):
    """encode and decode return what they are told to make of a tensor."""

    def __init__(self, encoded, decoded=lambda x: x) -> None:
        super().__init__()
        self.encode, self.decode = encoded, decoded


FORMS = {
    "tensor": lambda x: x,
    "latents": lambda x: SimpleNamespace(latents=x),
    "latent": lambda x: SimpleNamespace(latent=x),
    "gaussian": lambda x: torch.distributions.Normal(x, torch.ones_like(x)),
    "latent_dist": lambda x: SimpleNamespace(latent_dist=torch.distributions.Normal(x, torch.ones_like(x))),
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_encode_returns_is_understood(form):
    x = images(100)
    code = Returns(FORMS[form], lambda z: SimpleNamespace(sample=z))
    representation = ld.LatentRepresentation(code, 0.0, 1.0)
    assert_close(representation.encode(x), x)
    assert_close(representation.decode(x), x)
    assert (form in ("gaussian", "latent_dist")) == (
        not torch.equal(representation.draw(x, ld.RandomKey()), x)
    )


def test_images_leave_the_decoder_in_range():
    assert ld.LatentRepresentation(rotation(), 0.0, 0.1).decode(torch.randn(9, 4, 4, 4)).abs().max() == 1


def with_file(folder, **arguments):
    """An autoencoder that reads its parameters from code.safetensors."""
    save_file(rotation().state_dict(), folder / "code.safetensors")
    code = ld.PretrainedAutoencoder(ld.PatchPCA(), str(folder / "code.safetensors"))
    return latent_module(code, **arguments)


@pytest.mark.slow
def test_a_checkpoint_alone_draws_the_same_in_a_fresh_process(tmp_path):
    """Measured beforehand; measured by the fit; from a file that is gone; from a file, and not saved."""
    (tmp_path / "gone").mkdir()
    models = {
        "given": latent_module(),
        "measured": latent_module(ld.PatchPCA()),
        "gone": with_file(tmp_path / "gone"),
        "not saved": with_file(tmp_path, save_autoencoder=False),
    }
    for name, model in models.items():
        fit(model, steps=2).save_checkpoint(tmp_path / f"{name}.ckpt")
    (tmp_path / "gone" / "code.safetensors").unlink()
    drawn = drawn_elsewhere([tmp_path / f"{name}.ckpt" for name in models], tmp_path)
    for model, samples in zip(models.values(), drawn, strict=True):
        assert torch.equal(samples, model.sample(3, seed=4))
    with pytest.raises(FileNotFoundError, match=r"does not exist: give the \.safetensors"):
        ld.PretrainedAutoencoder(ld.PatchPCA(), str(tmp_path / "absent.safetensors")).encode(images())


def test_without_the_autoencoder_a_checkpoint_is_small_and_holds_to_it(tmp_path):
    fit(with_file(tmp_path, save_autoencoder=False), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    own = {name.removeprefix("representation.") for name in saved if not name.startswith("network.")}
    assert own == {"shift", "scale", "fingerprint"}
    changed = rotation().state_dict()
    changed["basis"][0] *= -1
    save_file(changed, tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match="autoencoder whose parameters hash to"):
        ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "code.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"code\.safetensors does not exist"):
        ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")


def test_a_foreign_autoencoder_is_given_when_loading(tmp_path):
    model = latent_module(trained_convolutional(), (2, 4, 4))
    fit(model, steps=2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"give load_from_checkpoint\(..., representation=...\)"):
        ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    own = ld.LatentRepresentation(trained_convolutional(1))
    again = ld.DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", representation=own)
    assert torch.equal(again.sample(3), model.sample(3))


def test_only_the_network_runs_in_low_precision():
    model = latent_module(trained_convolutional(), (2, 4, 4))
    model.representation.measure([images()])
    expected = model.representation.encode(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.representation.encode(images()), expected)
    assert_close(model.representation.bfloat16().encode(images()), expected, rtol=0.1, atol=0.1)


REFUSED = {
    "no decode": (lambda: ld.LatentRepresentation(nn.Linear(1, 1)), "no method encode or decode"),
    "scale alone": (lambda: ld.LatentRepresentation(rotation(), scale=0.2), r"scale=0.2; .* shift is 0\.0"),
    "zero": (lambda: ld.LatentRepresentation(rotation(), 0.0, 0.0), "scale != 0"),
    "channels": (
        lambda: ld.LatentRepresentation(rotation(), [0.0] * 3, [1.0] * 3).encode(images()),
        "latents of 4 channels, but shift and scale for 3",
    ),
    "form": (lambda: ld.LatentRepresentation(Returns(str), 0.0, 1.0).encode(images()), "encode returns str"),
    "decoded": (
        lambda: ld.LatentRepresentation(Returns(str, str), 0.0, 1.0).decode(images()),
        "decode to return str",
    ),
    "too many": (lambda: ld.PatchPCA(5), "channels=5; expected 1 to 4"),
    "odd size": (lambda: rotation().encode(torch.zeros(1, 1, 7, 8)), "7 x 8 pixels; expected multiples"),
    "lost": (
        lambda: ld.LatentRepresentation(ld.PatchPCA(), save_autoencoder=False).measure([images()]),
        "would lose what was measured",
    ),
    "measured on latents": (
        lambda: ld.LatentRepresentation(ld.PatchPCA(), encoded=True).measure([images()]),
        r"found no images .* PretrainedAutoencoder\(PatchPCA",
    ),
    "network": (lambda: fit(latent_module(shape=(1, 8, 8))), r"\(4, 4, 4\), expected .*\(1, 8, 8\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_file_of_another_autoencoder_is_refused(tmp_path):
    save_file(rotation(3).state_dict(), tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match="of another network: 1 tensors of another shape"):
        ld.PretrainedAutoencoder(ld.PatchPCA(4), str(tmp_path / "three.safetensors"))
