"""Published EDM2 and DiT networks: their outputs, training forward and gradients; wrong state dicts are refused."""

import pytest
import torch
from published import published
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.noise_level import NoiseLevel

EDM2 = ["edm2_conditional", "edm2_unconditional"]
OUTPUT = {"rtol": 0, "atol": 1e-5}
TRAINING = {"rtol": 0, "atol": 1e-4}


def edm2(name):
    found = published(name)
    return ld.edm2_from_state_dict(found.state_dict, found.config), found


@pytest.mark.parametrize("name", EDM2)
def test_edm2_gives_the_published_outputs(name):
    denoiser, found = edm2(name)
    assert_close(denoiser(**found.given), found.expected["denoised"], **OUTPUT)
    assert_close(denoiser.log_variance(found.given["sigma"]), found.expected["logvar"].flatten(), **OUTPUT)


@pytest.mark.parametrize("name", EDM2)
def test_edm2_trains_as_published(name):
    denoiser, found = edm2(name)
    output = denoiser.train()(**found.given)
    output.square().mean().backward()
    gradients = {
        "train_grad.unet.emb_noise.weight": denoiser.network.embedding.noise.weight.grad,
        "train_grad.unet.out_gain": denoiser.network.gain.grad,
    }
    assert gradients.keys() == {key for key in found.expected if key.startswith("train_grad.")}
    assert_close(output, found.expected["train_denoised"], **TRAINING)
    for key, gradient in gradients.items():
        assert_close(gradient, found.expected[key], **TRAINING)
        assert_close(gradient, found.expected[key], rtol=1e-4, atol=1e-8)


def test_edm2_without_labels_is_edm2_with_none_of_them():
    denoiser, found = edm2("edm2_conditional")
    x, sigma = found.given["x"], found.given["sigma"]
    assert_close(denoiser(x, sigma), denoiser(x, sigma, torch.zeros(3, 3)))
    assert not torch.allclose(denoiser(x, sigma), found.expected["denoised"], atol=1e-2)


def test_the_network_of_a_published_edm2_serves_our_objective():
    """Class numbers instead of one-hot labels, our noise levels, and the head as the objective's weighting."""
    denoiser, found = edm2("edm2_conditional")
    objective = ld.EDM2(found.config["sigma_data"], weighting=denoiser.uncertainty)
    sigma, label = found.given["sigma"], found.given["class_labels"].argmax(1)
    level = NoiseLevel(torch.ones_like(sigma), sigma)
    drawn = objective.denoise(denoiser.network, found.given["x"], level, {"label": label})
    assert_close(drawn, found.expected["denoised"], **OUTPUT)
    c_noise = objective.preconditioning.c_noise(level)
    assert_close(objective.weighting.log_loss(c_noise), found.expected["logvar"].flatten(), **OUTPUT)


def test_dit_gives_the_published_outputs():
    found = published("dit_patch2")
    network = ld.dit_from_state_dict(found.state_dict, found.config)
    assert_close(network(**found.given), found.expected["out"], **OUTPUT)


def test_the_network_of_a_published_dit_serves_our_objective():
    """The noise that it predicts, without the variance, at the timesteps of our table."""
    found = published("dit_patch2")
    network = ld.dit_from_state_dict(found.state_dict, found.config).network
    objective = ld.DDPM()
    level = objective.schedule.at(objective.schedule.log_snrs[found.given["t"]])
    x = found.given["x"].double()
    x0 = objective.denoise(network, x, level, {"label": found.given["y"]})
    noise = (x - level.alpha[:, None, None, None] * x0) / level.sigma[:, None, None, None]
    assert_close(noise.float(), found.expected["out"][:, :2], **OUTPUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.out_conv.weight": None}, r"unet\.out_conv\.weight is missing"),
        (
            {"unet.out_conv.weight": torch.zeros(2, 8, 3, 3)},
            r"has shape \(2, 8, 3, 3\), expected \(2, 16, 3, 3\)",
        ),
        ({"unet.enc.2x2_down.emb_gain": torch.zeros(())}, r"unet\.enc\.2x2_down\.emb_gain is not known"),
        ({"logvar_linear.weight": torch.zeros(1, 64)}, r"has shape \(1, 64\), expected \(1, 128\)"),
    ],
)
def test_edm2_of_another_size_is_refused(change, message):
    found = published("edm2_conditional")
    state = {name: tensor for name, tensor in {**found.state_dict, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        ld.edm2_from_state_dict(state, found.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 1}, r"blocks\.1\.\S+ is not known; .*and \d+ more\. Give the configuration"),
        ({"depth": 3}, r"blocks\.2\.\S+ is missing"),
        ({"hidden_size": 16}, r"has shape \(\S+ 32\S*\), expected"),
        ({"num_classes": 10}, r"embedding_table\.weight has shape \(4, 32\), expected \(11, 32\)"),
        ({"learn_sigma": False}, r"final_layer\.linear\.\S+ has shape \(16.*expected \(8"),
    ],
)
def test_dit_of_another_size_is_refused(change, message):
    found = published("dit_patch2")
    with pytest.raises(ValueError, match=message):
        ld.dit_from_state_dict(found.state_dict, {**found.config, **change})


def test_half_precision_files_load_as_float32():
    found = published("dit_patch2")
    halves = {name: tensor.half() for name, tensor in found.state_dict.items()}
    network = ld.dit_from_state_dict(halves, found.config)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert_close(network(**found.given), found.expected["out"], rtol=0, atol=1e-2)
