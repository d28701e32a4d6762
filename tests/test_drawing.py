"""Drawing from a DiffusionModule: what samples depend on and what is refused."""

import pytest
import torch
from small_module import fit, module, network
from torch.testing import assert_close

import lightning_diffusion as ld


def test_sampling_leaves_the_training_alone_and_does_not_depend_on_the_batch():
    model = module().train()
    fit(model)
    state, was_training = torch.get_rng_state(), model.network.training
    label = torch.arange(9) % 10
    together = model.sample(9, {"label": label}, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.network.training == was_training
    apart = torch.cat(list(model.sample_batches(9, {"label": label}, model.sampler, seed=3, batch_size=4)))
    assert_close(apart, together, rtol=0, atol=1e-5)
    assert together.min() >= -1
    assert together.max() <= 1
    assert not torch.equal(model.sample(9, {"label": label}, seed=4), together)


def test_guidance_moves_samples_and_needs_a_null_label():
    model = module()
    fit(model, steps=20)
    label = {"label": torch.arange(4)}
    plain, guided = model.sample(4, label), model.sample(4, label, guidance=ld.ClassifierFree(3.0))
    assert not torch.allclose(plain, guided)
    assert_close(model.sample(4, label, guidance=ld.ClassifierFree(0.0)), model.sample(4))
    with pytest.raises(ValueError, match="needs a null label"):
        module(network=network(0)).denoiser(guidance=ld.ClassifierFree(2.0))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"label": torch.tensor([0, 11])}, "from 0 to 11; expected 0 to 9"),
        ({"label": torch.zeros(3).long()}, "Found 3"),
    ],
)
def test_bad_conditions_are_named(condition, message):
    with pytest.raises(ValueError, match=message):
        module().sample(2, condition)


def test_weights_of_another_network_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"network.head.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"another network.*head.weight.*\(2, 2\)"):
        module().sample(1, weights=str(tmp_path / "other.safetensors"))
