"""Memory plans: against real steps, closed forms, and arithmetic that can be done by hand."""

import importlib.util
from pathlib import Path

import lightning as L
import pytest
import torch
from small_module import module, network
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.activation_checkpointing import blocks_of, checkpoint_blocks_
from lightning_diffusion.analysis.memory import MemoryPlanner, Setting, closed_form, plan_memory, spread
from lightning_diffusion.callbacks import EMA

SHAPE = (16, 1, 8, 8)


def benchmark():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_plan.py"
    spec = importlib.util.spec_from_file_location("memory_plan", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Chain(L.LightningModule):
    """Linear layers whose memory can be counted by hand."""

    def __init__(self, width=64, depth=4):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])

    def training_step(self, batch, batch_idx):
        return self.layers(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def planner():
    return MemoryPlanner(module(representation=ld.Identity()), SHAPE, Setting(), [EMA()])


def test_a_chain_of_linear_layers_is_what_one_counts():
    """Four weights of 64 x 64; kept: the batch, three hidden activations, and the output while it is summed."""
    plan = plan_memory(Chain(), (1000, 64))
    weights = 4 * 4 * 64 * 64
    assert plan.parts[:4] == (weights, weights, weights, 0)
    kept = 5 * 4 * 1000 * 64
    assert kept <= plan.parts.activations <= kept + 64


def test_nothing_is_allocated_and_nothing_changes():
    model = module(network=network().to("meta"), representation=ld.Identity())
    plan = plan_memory(model, SHAPE)
    assert plan.parts.parameters >= 4 * sum(p.numel() for p in model.parameters())
    assert all(p.device.type == "meta" and p.grad is None for p in model.network.parameters())


def test_a_module_with_values_is_left_as_it_was():
    model = module(representation=ld.Identity())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_memory(model, SHAPE, Setting("bf16-mixed", checkpointing=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(part) for part in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_factory_and_a_module_give_one_plan(planner):
    assert (
        plan_memory(lambda: module(representation=ld.Identity()), SHAPE).parts[4] == planner.plan().parts[4]
    )


def test_every_average_adds_the_weights(planner):
    two = EMA({"short": ld.FixedDecay(0.9), "long": ld.FixedDecay(0.999)})
    with_two = MemoryPlanner(module(representation=ld.Identity()), SHAPE, Setting(), [two]).plan()
    weights = 4 * sum(p.numel() for p in network().parameters())
    assert planner.plan().parts.averages == weights
    assert with_two.parts.averages == 2 * weights


def test_float32_is_the_closed_form(planner):
    plan = planner.plan()
    low, high = closed_form(plan.parts.gradients, plan.parts.activations, "32-true", averages=1)
    assert low == high == pytest.approx(plan.total, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_low_precision_needs_less_for_activations(planner, precision):
    plan = plan_memory(module(representation=ld.Identity()), SHAPE, Setting(precision))
    assert plan.parts.activations < planner.plan().parts.activations
    halves = precision == "bf16-true"
    assert (plan.parts.optimizer < 0.6 * planner.plan().parts.optimizer) == halves


def test_the_largest_batch_fits_and_the_next_does_not(planner):
    memory = planner.plan(100).total + 1000
    largest = planner.largest_batch(memory)
    assert planner.plan(largest).total <= memory < planner.plan(largest + 1).total
    assert planner.estimated_batch(memory) == pytest.approx(largest, rel=0.02)
    assert planner.largest_batch(planner.plan().parts.weights) == 0


def test_devices_share_weights_under_fsdp_and_copy_them_under_ddp(planner):
    one, ddp = planner.plan().parts, planner.over(Setting(strategy="ddp", devices=4)).parts
    fsdp = planner.over(Setting(strategy="fsdp", devices=4)).parts
    assert (ddp.weights, ddp.communication) == (one.weights, one.gradients)
    assert fsdp.weights == pytest.approx(one.weights / 4, abs=4)
    assert fsdp.activations == one.activations
    assert spread(one, Setting(), network()) == one


def test_several_devices_need_a_strategy():
    with pytest.raises(ValueError, match="Found 8 devices with strategy='one'"):
        Setting(devices=8)


def test_a_step_that_asks_for_values_cannot_be_planned():
    class Asking(Chain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.item() > 0 else -loss

    with pytest.raises(ValueError, match="Asking needs the values of tensors"):
        plan_memory(Asking(), (10, 64))


def test_checkpointed_blocks_give_the_same_gradients():
    plain, recomputed = network(), network()
    nn.init.normal_(plain.head.weight)
    recomputed.load_state_dict(plain.state_dict())
    checkpoint_blocks_(recomputed)
    checkpoint_blocks_(recomputed)
    x, c_noise = torch.randn(4, 1, 8, 8), torch.randn(4)
    for net in (plain, recomputed):
        net(x, c_noise).square().sum().backward()
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_blocks_are_the_members_of_lists_and_their_kind():
    net = network()
    assert blocks_of(net) == [*net.down, *net.up, net.middle]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Found no blocks in Linear"):
        checkpoint_blocks_(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("setting", [Setting(), Setting("bf16-mixed"), Setting(checkpointing=True)], ids=repr)
def test_a_plan_is_what_a_real_fit_takes(setting):
    script = benchmark()
    planned = script.plan(24, 16, setting, batch=8).total
    assert planned == pytest.approx(script.measure(script.new_module(24, 16), setting, batch=8), rel=0.1)
