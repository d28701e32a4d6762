"""diffusers' models and ours: the same answers, both ways."""

import pytest
import torch
from torch.testing import assert_close

import lightning_diffusion as ld

diffusers = pytest.importorskip("diffusers")

from exported_modules import (  # noqa: E402
    DIFFUSERS,
    DIT_OPTIONS,
    LABEL,
    NOISE,
    UNET,
    dit,
    drawn,
    function,
    module,
    spread,
    unet,
)

from lightning_diffusion import adapters  # noqa: E402

T = torch.tensor([0.0, 7.0, 500.0, 999.0])


@torch.no_grad()
def answers(model, label=LABEL):
    return model(NOISE, T, class_labels=label).sample


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_dit_goes_there_and_back(num_classes):
    network = dit(num_classes)
    there = adapters.dit_to_diffusers(network)
    label = LABEL if num_classes else torch.zeros(4).long()
    with torch.no_grad():
        own = network.respond(NOISE, T, label if num_classes else None)
    assert_close(answers(there, label), own, rtol=1e-5, atol=1e-5)
    if num_classes:
        back = adapters.dit_from_diffusers(there).state_dict()
        assert all(torch.equal(back[name], x) for name, x in network.state_dict().items())


def test_a_dit_of_diffusers_comes_here():
    theirs = spread(diffusers.DiTTransformer2DModel(2, 8, 3, 6, 2, sample_size=8, num_embeds_ada_norm=3))
    with pytest.raises(ValueError, match=r"Block 1 .* embeds noise and class otherwise than block 0"):
        adapters.dit_from_diffusers(theirs)
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(
        theirs.transformer_blocks[0].norm1.emb.state_dict()
    )
    network = adapters.dit_from_diffusers(theirs)
    assert network.image_shape == (3, 8, 8)
    assert_close(network.respond(NOISE, T, LABEL), answers(theirs), rtol=0, atol=3e-5)  # norm_eps differs
    assert type(ld.DiffusionModule(network).network) is ld.DiT


def test_a_unet_of_diffusers_comes_here_and_goes_back():
    theirs = spread(diffusers.UNet2DModel(**UNET))
    network = adapters.unet_from_diffusers(theirs).eval()
    assert (network.num_classes, network.image_shape) == (3, (3, 8, 8))
    assert torch.equal(network(NOISE, T, LABEL), answers(theirs))
    assert torch.equal(network(NOISE, T), answers(theirs, torch.full((4,), 3)))
    assert torch.equal(answers(adapters.unet_to_diffusers(network)), answers(theirs))
    longer = adapters.unet_from_diffusers(theirs, has_null_label=False).eval()
    assert longer.num_classes == 4
    assert torch.equal(longer(NOISE, T, LABEL), answers(theirs))


REFUSED = [
    (lambda: ld.DiffusersUNet({**UNET, "sample_size": None}), ValueError, "sample_size=None"),
    (lambda: ld.DiffusersUNet({**UNET, "time_embedding_type": "fourier"}), ValueError, "'fourier'"),
    (lambda: adapters.dit_to_diffusers(ld.DiT((3, 8, 8), size=ld.DiTSize(16, 1, 2))), ValueError, "qk_norm=True"),
    (
        lambda: adapters.dit_to_diffusers(ld.DiT((3, 8, 16), 2, ld.DiTSize(16, 1, 2), 0, DIT_OPTIONS)),
        ValueError,
        "8 x 16; .* squares only",
    ),
    (lambda: adapters.dit_from_diffusers(torch.nn.Linear(1, 1)), TypeError, "Found Linear; expected DiT"),
    (
        lambda: adapters.dit_from_diffusers(diffusers.DiTTransformer2DModel(1, 8, 3, 3, 1, activation_fn="geglu")),
        ValueError,
        "activation_fn='geglu', not 'gelu-approximate'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_differs_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


ZERO = ld.CosineSchedule(zero_terminal_snr=True)
DRAWS = [
    (unet, ld.EDM(), ld.Euler(9)),
    (unet, ld.EDM(sigma_data=1.0), ld.DPMSolver2M(9)),
    (dit, ld.EDM(), ld.DPMSolver2M(20)),
    (dit, ld.DDPM(), ld.Euler(9)),
    (unet, ld.DDPM(), ld.DPMSolver2M(7)),
    (dit, ld.DDPM(target=ld.X0()), ld.DDIM(9)),
    (unet, ld.VPrediction(), ld.DPMSolver2M(9)),
    (dit, ld.VPrediction(ZERO), ld.DDIM(10)),
]


@pytest.mark.parametrize(("network", "objective", "sampler"), DRAWS)
@pytest.mark.parametrize("bounded", [True, False])
def test_plain_diffusers_draws_the_same_images(network, objective, sampler, bounded, tmp_path):
    model = module(network(), objective, representation=ld.Identity(bounded))
    ld.export_diffusers(model, tmp_path / "it", sampler=sampler)
    ours = drawn(model, sampler)
    theirs = function(DIFFUSERS)(tmp_path / "it", sampler.num_steps, NOISE, LABEL)
    assert_close(theirs, ours, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "sampler", "message"),
    [
        (lambda: module(unet()), ld.Heun(), "no scheduler for Heun.* expected Euler, DPMSolver2M"),
        (lambda: module(unet(), ld.RectifiedFlow()), ld.Euler(), "no scheduler for RectifiedFlow"),
        (lambda: module(unet(), ld.VPrediction(ZERO)), ld.DPMSolver2M(), "choose Euler"),
        (lambda: module(ld.UNet((3, 8, 8), 8)), ld.Euler(), "diffusers has no UNet: expected DiffusersUNet"),
    ],
)
def test_what_diffusers_has_not_is_refused_and_nothing_written(model, sampler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ld.export_diffusers(model(), tmp_path / "it", sampler=sampler)
    assert not list(tmp_path.iterdir())
