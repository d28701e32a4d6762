"""What every network has to do: one graph, float32 where it must be, checkpoints that load by themselves."""

import copy

import pytest
import torch
from cases import NETWORKS
from precision_recorder import Recorder
from small_module import fit
from torch import nn
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.float32_islands import Precisions, find_islands

NAMES = [f"{type(network).__name__}-{number}" for number, network in enumerate(NETWORKS)]


def woken(network):
    """A copy with every zero-initialised weight set off zero, as training would."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(1)
    for p in network.parameters():
        if not p.any():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return network


def conditions(network):
    label = {"label": torch.tensor([0, 3, 2])}
    return label | ({"context": torch.ones(3, 2, network.context_dim)} if network.context_dim else {})


X, LEVEL = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=NAMES)
def test_training_is_one_graph(network):
    """Values and gradients, and weights that are put back to unit norm in place."""
    eager, traced = (woken(network).train() for _ in range(2))
    outputs = []
    for one in (eager, traced):
        call = torch.compile(one, backend="eager", fullgraph=True) if one is traced else one
        outputs.append(call(X, LEVEL, **conditions(network)))
        outputs[-1].square().sum().backward()
    assert_close(*outputs)
    pairs = zip(eager.named_parameters(), traced.parameters(), strict=True)
    for (name, p), q in pairs:
        assert_close(p, q, msg=name)
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def in_bfloat16(network):
    """Under a door and its islands, as DiffusionPrecision puts them; in place of a copy."""
    low, in_place = woken(network), Precisions("cpu")
    in_place.open(low, torch.bfloat16)
    islands = find_islands(low, [])
    for island in islands.values():
        in_place.raise_(island)
    return low, islands


@pytest.mark.parametrize("network", NETWORKS, ids=NAMES)
def test_norms_embeddings_and_logits_are_float32_in_a_bfloat16_network(network):
    low, islands = in_bfloat16(network)
    recorder = Recorder(nn.ModuleDict({"network": low}))
    with recorder:
        output = low(X, LEVEL, **conditions(network))
    assert recorder.of("convolution") == {torch.bfloat16}
    assert any(name.endswith("embedding") for name in islands)
    assert recorder.of("mm", within="embedding") | recorder.of("cos") == {torch.float32}
    for statistic in ("native_group_norm", "native_layer_norm", "rsqrt", "linalg_vector_norm"):
        assert recorder.of(statistic) <= {torch.float32}, statistic
    assert recorder.of("softmax") <= {torch.float32}
    assert_close(output.float(), woken(network)(X, LEVEL, **conditions(network)), rtol=0, atol=0.05)


@pytest.mark.parametrize("network", NETWORKS, ids=NAMES)
def test_samples_of_a_batch_do_not_depend_on_each_other(network):
    network = woken(network).eval()
    together = network(X, LEVEL, **conditions(network))
    for i in range(3):
        alone = {name: value[i : i + 1] for name, value in conditions(network).items()}
        assert_close(network(X[i : i + 1], LEVEL[i : i + 1], **alone), together[i : i + 1])


MAKERS = [
    lambda: ld.UNet((1, 8, 8), channels=8, num_blocks=1, num_classes=10, context_dim=4),
    lambda: ld.MagnitudePreservingUNet((1, 8, 8), 8, (1, 2), 1, (1,), 10, 8),
    lambda: ld.DiT((1, 8, 8), 2, ld.DiTSize(16, 2, 2), 10, ld.DiTOptions(swiglu=False)),
]


@pytest.mark.parametrize("make", MAKERS, ids=["UNet", "MagnitudePreservingUNet", "DiT"])
def test_it_trains_in_bfloat16_and_loads_from_its_checkpoint_without_arguments(make, tmp_path):
    model = ld.DiffusionModule(make(), ld.EDM2(), ld.Standardize(sigma_data=0.5), sampler=ld.Euler(2))
    trainer = fit(model, steps=2, plugins=[ld.DiffusionPrecision("bf16-mixed")])
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = ld.DiffusionModule.load_from_checkpoint(tmp_path / "trained.ckpt")
    assert type(loaded.network) is type(model.network)
    assert getattr(loaded.network, "options", None) == getattr(model.network, "options", None)
    label = {"label": torch.tensor([1, 10])}
    drawn = loaded.sample(2, label)
    assert drawn.isfinite().all()
    assert_close(drawn, model.sample(2, label), rtol=0, atol=1e-6)
