"""Run by torchrun on two processes: norms and clipping of sharded gradients against those of the whole ones."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import torch
from cases import CLIPPING_RULES
from foreign import points
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_ema import Sharded, whole
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close

import lightning_diffusion as ld
from lightning_diffusion.callbacks import AdaptiveGradientClipping, GradientClipping, GradientSanitizer
from lightning_diffusion.gradients import Gradients, sanitize_


def network() -> nn.Module:
    """Five rows on two processes, a layer of one row, vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 1))


def with_gradients(net: nn.Module) -> list[nn.Parameter]:
    net(torch.linspace(-2, 2, 12).view(3, 4)).square().mean().backward()
    return list(net.parameters())


def gathered(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [whole(p.grad) for p in parameters]


def rows_apart(mesh) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Whole, and sharded by FSDP2 along the first axis."""
    net = network()
    sharded = copy.deepcopy(net)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    pair = with_gradients(net), with_gradients(sharded)
    sizes = {len(p.to_local()) for p in pair[1]}
    assert (0 in sizes) == (distributed.get_rank() == 1), sizes
    return pair


def columns_apart(mesh) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Whole, and as tensor parallelism has them: by columns, replicated, and gradients not yet summed."""
    plain = with_gradients(network())
    placements = [[Shard(1)] if p.ndim > 1 else [Replicate()] for p in plain]
    sharded = []
    for p, placement in zip(plain, placements, strict=True):
        sharded.append(nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placement)))
        sharded[-1].grad = distribute_tensor(p.grad.clone(), mesh, placement)
    share = plain[1].grad * (0.3 if distributed.get_rank() == 0 else 0.7)
    sharded[1].grad = DTensor.from_local(share, mesh, [Partial()])
    return plain, sharded


def check_norms(plain: list[nn.Parameter], sharded: list[nn.Parameter]) -> None:
    expected, found = Gradients([plain]), Gradients([sharded])
    with CommDebugMode() as communication:
        assert_close(found.norm, expected.norm, rtol=1e-6, atol=0)
        assert_close(found.norms, expected.norms, rtol=1e-6, atol=0)
    assert communication.get_total_counts() == 1, communication.get_comm_counts()


def check_rules(make, mesh) -> None:
    for rule in CLIPPING_RULES:
        plain, sharded = make(mesh)
        rule(Gradients([plain[:3], plain[3:]]))
        gradients = Gradients([sharded[:3], sharded[3:]])
        with CommDebugMode() as communication:
            rule(gradients)
        assert communication.get_total_counts() == (0 if isinstance(rule, ld.Value) else 1), rule
        assert_close(gathered(sharded), [p.grad for p in plain], rtol=2e-6, atol=1e-9)


def check_sanitizing(mesh) -> None:
    plain, sharded = rows_apart(mesh)
    local = sharded[0].grad.to_local()
    local[0, 0] = torch.nan
    count = sanitize_(Gradients([sharded]))
    assert int(count) == 1
    assert_close(gathered(sharded)[0][0, 1:], plain[0].grad[0, 1:])
    assert float(gathered(sharded)[0][0, 0]) == float(gathered(sharded)[0][3, 0]) == 0


class ZeroHead(Sharded):
    """With Adam's blindness for scale taken away, and a layer that starts at zero."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks, self.elements = breaks, []
        self.body[3].weight = nn.Parameter(torch.zeros(5, 5))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    def on_after_backward(self) -> None:
        if self.breaks and self.global_step == 1:
            self.head.weight.grad.to_local()[0, 0] = torch.nan

    def on_train_batch_end(self, *_) -> None:
        self.elements.append(self.trainer.logged_metrics.get("train/sanitized_elements"))


class Definition(L.Callback):
    """The norm of the gathered gradients."""

    def __init__(self) -> None:
        self.norms, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        found = [
            whole(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        self.norms.append(float(nn.utils.get_total_norm(found)))

    def on_train_batch_end(self, trainer, *_) -> None:
        self.logged.append(float(trainer.logged_metrics.get("train/grad_norm", -1)))


def fit(module: L.LightningModule, *callbacks: L.Callback) -> None:
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False, "log_every_n_steps": 1}
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=3, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module, points(16))


def check_callbacks() -> None:
    before, after = Definition(), Definition()
    fit(ZeroHead(), before, GradientClipping(ld.GlobalNorm(1e-3)), after)
    assert_close(after.norms, [1e-3] * 3, rtol=2e-3, atol=0)
    assert_close(before.logged, before.norms, rtol=1e-6, atol=0)
    adaptive = AdaptiveGradientClipping(0.01)
    fit(ZeroHead(), adaptive)
    names = ["body.1.bias", "body.3.weight", "body.3.bias", "head.weight", "head.bias"]
    assert adaptive.state_dict() == {"left_alone": names}, adaptive.state_dict()
    broken = ZeroHead(breaks=True)
    fit(broken, GradientSanitizer())
    assert [float(x) for x in broken.elements] == [0.0, 2.0, 0.0], broken.elements


def main(_: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    check_norms(*rows_apart(mesh))
    check_norms(*columns_apart(mesh))
    check_rules(rows_apart, mesh)
    check_rules(columns_apart, mesh)
    check_sanitizing(mesh)
    check_callbacks()
