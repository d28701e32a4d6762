"""UNet with a context: what it attends to, what nothing to attend to is, how contexts travel and are dropped."""

import lightning as L
import pytest
import torch
from foreign import QUIET
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import lightning_diffusion as ld
from lightning_diffusion.batches import drop_conditions


def small(context_dim=6, **arguments):
    torch.manual_seed(0)
    return ld.UNet((1, 8, 8), channels=8, num_blocks=1, context_dim=context_dim, **arguments)


def woken(network):
    """The network with every zero-initialised weight set off zero, as training would."""
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if not p.any():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return network


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, LEVEL, CONTEXT = draw(3, 1, 8, 8), torch.zeros(3), draw(3, 5, 6, seed=1)


def test_context_is_attended_to_as_a_set_and_samples_do_not_mix():
    network = woken(small())
    output = network(X, LEVEL, context=CONTEXT)
    assert_close(network(X, LEVEL, context=CONTEXT.flip(1)), output)
    assert_close(network(X, LEVEL, context=CONTEXT.repeat(1, 3, 1)), output)
    assert (network(X, LEVEL, context=CONTEXT.flip(0)) - output).abs().max() > 1e-2
    assert_close(network(X[:1], LEVEL[:1], context=CONTEXT[:1]), output[:1])


def test_no_context_is_the_null_context_of_any_length():
    network = woken(small())
    nothing = network(X, LEVEL)
    for tokens in (1, 5, 77):
        assert_close(network(X, LEVEL, context=torch.zeros(3, tokens, 6)), nothing)
    assert (network(X, LEVEL, context=CONTEXT) - nothing).abs().max() > 1e-2


def test_it_starts_at_zero_and_every_parameter_gets_a_gradient_in_the_end():
    network = small()
    assert not network(X, LEVEL, context=CONTEXT).any()
    woken(network)(X, LEVEL, context=CONTEXT).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_labels_and_contexts_are_dropped_together():
    key = ld.RandomKey(7)
    condition = {
        "label": torch.zeros(4000, dtype=torch.int64),
        "context": torch.ones(4000, 2, 3),
        "other": torch.ones(2),
    }
    dropped = drop_conditions(condition, 10, 0.25, key)
    nulls = dropped["label"] == 10
    assert torch.equal((dropped["context"] == 0).all(dim=(1, 2)), nulls)
    assert torch.equal((dropped["context"] == 1).all(dim=(1, 2)), ~nulls)
    assert nulls.float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert torch.equal(dropped["other"], condition["other"])
    alone = drop_conditions({"context": condition["context"]}, 0, 0.25, key)
    assert torch.equal(alone["context"], dropped["context"])
    assert not condition["label"].any()


class Told(L.LightningDataModule):
    """Images of one of two patterns, told by the context alone."""

    def __init__(self):
        super().__init__()
        which = torch.arange(64) % 2
        patterns = torch.stack([-torch.ones(1, 8, 8), torch.ones(1, 8, 8)])
        words = draw(2, 3, 6, seed=4)
        self.words, self.data = words, TensorDataset(patterns[which], words[which])

    def train_dataloader(self):
        def collate(rows):
            images, context = (torch.stack(part) for part in zip(*rows, strict=True))
            return {"image": images, "context": context}

        return DataLoader(self.data, batch_size=32, collate_fn=collate)


def test_a_context_says_what_to_draw():
    """Trained through the module on batches that hold a context; guidance without labels."""
    data = Told()
    torch.manual_seed(0)
    network = small(multipliers=(1,), attention_levels=(0,))
    optimizer = lambda p: torch.optim.Adam(p, lr=1e-2)  # noqa: E731
    model = ld.DiffusionModule(network, ld.EDM(sigma_data=1.0), sampler=ld.Euler(8), optimizer=optimizer)
    L.Trainer(**QUIET, max_steps=60, enable_checkpointing=False).fit(model, datamodule=data)
    context = data.words.repeat_interleave(4, 0)
    for guidance in (None, ld.ClassifierFree(1.5)):
        drawn = model.sample(8, {"context": context}, guidance=guidance).mean(dim=(1, 2, 3))
        assert drawn[:4].mean() < -0.5
        assert drawn[4:].mean() > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: small(6)(X, LEVEL, context=CONTEXT[..., :4]),
            r"shape \(3, 5, 4\); expected \(batch, tokens, 6\)",
        ),
        (lambda: small(6)(X, LEVEL, context=CONTEXT[:, 0]), r"shape \(3, 6\); expected \(batch, tokens, 6\)"),
        (lambda: small(0)(X, LEVEL, context=CONTEXT), "has context_dim=0"),
        (
            lambda: small(6, attention_levels=()),
            r"context_dim=6 with attention_levels=\[\].*Write attention_levels=",
        ),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_context_that_the_network_would_not_hear_is_refused():
    dit = ld.DiffusionModule(ld.DiT((1, 8, 8), size=ld.DiTSize(16, 1, 2)))
    with pytest.raises(ValueError, match="has a context, but DiT takes none"):
        L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False).fit(dit, datamodule=Told())


def test_guidance_needs_something_to_leave_out():
    module = ld.DiffusionModule(small(0))
    with pytest.raises(ValueError, match="needs a null label, and UNet has no classes"):
        module.denoiser(guidance=ld.ClassifierFree(2.0))


def test_stable_targets_refuse_contexts_that_they_would_mix():
    objective = ld.EDM(stable_target=ld.StableTarget())
    with pytest.raises(ValueError, match=r"also conditioned on \['context'\]"):
        objective.loss(small(), X, {"context": CONTEXT})
