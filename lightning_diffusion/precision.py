"""Precision plugins that keep in float32 what must be.

In low precision run the network's products, convolutions, activations and skips. In float32 stay batch, noise, levels,
coefficients, loss, guidance, the sampler's state and what a decoder puts out, because autocast ends at the network's
door; within the network noise embedding, normalisations and softmax are islands (float32_islands.py), and any module
that a pattern names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from lightning_diffusion.analysis.number_formats import Hardware, hardware_of, recommended_precision
from lightning_diffusion.float32_islands import Precisions, find_islands
from lightning_diffusion.loss_scaling import LossScaler, LossScaling
from lightning_diffusion.step_gradients import unscale_

LowPrecision = Literal["bf16-mixed", "16-mixed", "bf16-true"]


class DiffusionPrecision(MixedPrecision):
    """Train in low precision; goes into the Trainer's `plugins`, in place of its `precision`.

    A module says by `low_precision_modules()` what runs in low precision, wherever it is called: in DiffusionModule the
    network. Of a module without that method all steps do. Callbacks see unscaled gradients with fused optimizers too.

    Args:
        precision: bf16-mixed; 16-mixed, with loss scaling, also on a CPU; or bf16-true, whose parameters, gradients
            and optimizer states are bfloat16 as well (but for islands), float32 again after the training.
        fp32_modules: patterns of the names of modules that compute in float32 besides, such as "network.head".
        loss_scaling: of 16-mixed.

    Raises:
        ValueError: for patterns that fit no module; for loss_scaling without float16.
    """

    def __init__(
        self,
        precision: LowPrecision = "bf16-mixed",
        fp32_modules: list[str] | None = None,
        loss_scaling: LossScaling | None = None,
    ) -> None:
        _check_precision(precision, loss_scaling)
        self.precision: Any = precision
        self.fp32_modules = list(fp32_modules or [])
        self.loss_scaling = loss_scaling or LossScaling()
        self.device = "cpu"
        self.scaler: torch.amp.GradScaler | None = None
        self._doors: list[nn.Module] = []
        self._in_place: Precisions | None = None
        self._had_backward = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.precision!r})"

    @property
    def dtype(self) -> torch.dtype:
        """What low precision is."""
        return torch.float16 if self.precision == "16-mixed" else torch.bfloat16

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Put doors and islands in place; bf16-true rounds parameters."""
        self.teardown()
        self._check_strategy(module)
        self._go_to(_device_type(module))
        islands = find_islands(module, self.fp32_modules, self._choose_doors(module))
        dry = {id(part) for island in islands.values() for part in island.modules()}
        self._in_place = in_place = Precisions(self.device)
        for door in self._doors:
            if id(door) not in dry:
                in_place.open(door, self.dtype)
        for island in islands.values():
            in_place.raise_(island)
        if self.precision == "bf16-true":
            in_place.lower(self._doors or [module], islands.values(), self.dtype)
        return module

    def _choose_doors(self, module: nn.Module) -> list[nn.Module]:
        self._doors = _low_precision_modules(module)
        return self._doors

    def _check_strategy(self, module: nn.Module) -> None:
        if self.precision == "16-mixed" and isinstance(_strategy(module), ModelParallelStrategy):
            raise ValueError(
                f"{self!r} cannot scale the loss of sharded parameters. Under ModelParallelStrategy train with "
                "DiffusionFSDPPrecision, in bfloat16."
            )

    def _go_to(self, device_type: str) -> None:
        if self.precision == "16-mixed" and (self.scaler is None or device_type != self.device):
            self.scaler = LossScaler(device_type, self.loss_scaling)
        self.device = device_type
        if device_type == "cuda" and self.dtype is torch.bfloat16:
            _warn_of_emulation(hardware_of(device_type), self)

    def teardown(self) -> None:
        """Every forward and type as before."""
        if self._in_place is not None:
            self._in_place.remove()
        self._doors, self._in_place = [], None

    def autocast_context_manager(self) -> torch.autocast:
        """Low precision for all that is inside."""
        return torch.autocast(self.device, self.dtype, cache_enabled=False)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Around a step of a module that has no doors."""
        if self._doors:
            yield
        else:
            with self.autocast_context_manager():
                yield

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss."""
        self._had_backward = True
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, or skip it where float16 overflowed."""
        self._had_backward = not model.automatic_optimization
        return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        if self.scaler is not None and self._had_backward:
            unscale_(self.scaler, optimizer)
        super()._after_closure(model, optimizer)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip unscaled gradients, those of fused optimizers too."""
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


class DiffusionFSDPPrecision(DiffusionPrecision):
    """Train shards (FSDP2, ModelParallelStrategy): parameters bfloat16 where they compute, reductions float32.

    Each process keeps its shard of the parameters and of the optimizer's state in float32, gathers parameters as
    bfloat16 and those of islands as float32, and gradients are added up in float32. The module shards itself so:

        def configure_model(self):
            self.trainer.precision_plugin.shard_(self, self.device_mesh["data_parallel"], blocks=self.network.blocks)

    as DiffusionModule does.

    Args:
        fp32_modules: patterns of the names of modules that compute in float32 besides.

    Raises:
        ValueError: under another strategy; for a module that is sharded in another way.
    """

    def __init__(self, fp32_modules: list[str] | None = None) -> None:
        super().__init__("bf16-mixed", fp32_modules)

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """Of what runs in bfloat16. Inputs are left alone: autocast casts where an operator wants it."""
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    @property
    def float32_policy(self) -> MixedPrecisionPolicy:
        """Of islands."""
        return MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)

    def shard_(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        blocks: Sequence[nn.Module] = (),
        beside: Sequence[nn.Module] = (),
    ) -> None:
        """Shard a module, in its configure_model; does nothing the second time.

        Args:
            module: the LightningModule.
            mesh: of the processes to shard over.
            blocks: parts to gather one after the other, such as residual blocks; the rest is gathered as a whole.
            beside: trained parts outside of what runs in low precision; they compute in float32.
        """
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            return
        roots = _low_precision_modules(module) or _children_with_parameters(module)
        _refuse_trained_outside(module, [*roots, *beside])
        islands = find_islands(module, self.fp32_modules, roots).values()
        own = [i for i in islands if any(True for _ in i.parameters()) and _holds(roots, i)]
        if own:
            fully_shard(own, mesh=mesh, mp_policy=self.float32_policy, reshard_after_forward=False)
        for part in [*blocks, *roots]:
            if not isinstance(part, FSDPModule):
                fully_shard(part, mesh=mesh, mp_policy=self.policy)
        for part in beside:
            fully_shard(part, mesh=mesh, mp_policy=self.float32_policy)

    def _check_strategy(self, module: nn.Module) -> None:
        strategy = _strategy(module)
        if not isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"{type(self).__name__} is for ModelParallelStrategy, found {type(strategy).__name__}. Use "
                "DiffusionPrecision there."
            )
        policies = {p._get_fsdp_state()._mp_policy for p in module.modules() if isinstance(p, FSDPModule)}
        if not policies or policies - {self.policy, self.float32_policy}:
            raise ValueError(
                f"{type(self).__name__} found {'no sharded parts' if not policies else 'parts sharded otherwise'}. "
                'Write self.trainer.precision_plugin.shard_(self, self.device_mesh["data_parallel"], blocks) in '
                "configure_model."
            )


def _check_precision(precision: str, loss_scaling: LossScaling | None) -> None:
    if precision not in get_args(LowPrecision):
        raise ValueError(
            f"Found precision={precision!r}; expected one of {', '.join(get_args(LowPrecision))}. float16 without "
            "scaling (16-true) loses small gradients; for 32-true leave the plugin out."
        )
    if loss_scaling is not None and precision != "16-mixed":
        raise ValueError(
            f"Found loss_scaling={loss_scaling} with {precision!r}, which has float32's range and scales nothing. "
            "Leave it out, or train in 16-mixed."
        )


def _warn_of_emulation(hardware: Hardware, plugin: DiffusionPrecision) -> None:
    if not hardware.bfloat16:
        better = recommended_precision(hardware)
        rank_zero_warn(
            f"{plugin!r} is emulated on this device and slow. Use {better.precision}: {better.reason}."
        )


def _low_precision_modules(module: nn.Module) -> list[nn.Module]:
    choose: Callable[[], list[nn.Module]] | None = getattr(module, "low_precision_modules", None)
    return list(choose()) if choose else []


def _strategy(module: nn.Module) -> Any:
    trainer = getattr(module, "_trainer", None)
    return None if trainer is None else trainer.strategy


def _device_type(module: nn.Module) -> str:
    strategy = _strategy(module)
    if strategy is not None:
        return str(strategy.root_device.type)
    return next((p.device.type for p in module.parameters()), "cpu")


def _children_with_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _holds(roots: Sequence[nn.Module], part: nn.Module) -> bool:
    return any(part is inner for root in roots for inner in root.modules())


def _refuse_trained_outside(module: nn.Module, roots: Sequence[nn.Module]) -> None:
    held = {id(p) for root in roots for p in root.parameters()}
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if outside:
        raise ValueError(
            f"{outside[0]!r} and {len(outside) - 1} other parameters are trained but not within what is sharded, so "
            "their gradients would differ between processes. Add their modules to low_precision_modules(), and to "
            "fp32_modules where they need float32."
        )
