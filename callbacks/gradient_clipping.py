"""Clip gradients by a rule of lightning_diffusion.gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_diffusion.callbacks.gradient_callback import GradientCallback, log_now, logs_this_step
from lightning_diffusion.delicate_layers import delicate_parameters
from lightning_diffusion.gradients import Adaptive, ClippingRule, GlobalNorm
from lightning_diffusion.norms import Gradients, total_norm


class GradientClipping(GradientCallback):
    """Clip each optimizer's gradients before its step.

    When:   loss spikes, small batches, float16; which rule for which symptom: docs/gradients.md.
    Costs:  one norm, and on the CPU a multiplication only where something is over its bound; no memory, no
            synchronisation.
    Knobs:  the rule and its bound, on true gradients: a loss scale is divided out before.
    With:   any LightningModule, strategy (not FSDP1, DeepSpeed), precision, fused optimizers, accumulation, manual
            optimization. Instead of Trainer(gradient_clip_val=...), not beside it.
    Logs:   train/grad_norm (before clipping), train/clip_rate (share that was over its bound since the last
            logging step); of several optimizers with /0, /1, ...

    Args:
        rule: what is bounded by what.
        exclude: patterns of parameters' names, such as ["network.head.*"], that are not clipped.
        log_layers: also log train/grad_norm_of_layer/NAME.
    """

    def __init__(
        self,
        rule: ClippingRule = GlobalNorm(),
        exclude: list[str] | None = None,
        log_layers: bool = False,
    ) -> None:
        self.rule, self.exclude, self.log_layers = rule, tuple(exclude or ()), log_layers
        self.looks_at_units = rule.looks_at_units
        self._spares = rule.relative
        self._module: LightningModule | None = None
        self._delicate: list[str] | None = None
        self._left_alone: frozenset[int] = frozenset()
        self._names: dict[int, str] = {}
        self._rate_name, self._is_first = "clip_rate", True
        self._rates: dict[int, tuple[Tensor, int]] = {}

    @property
    def state_key(self) -> str:
        """The same for every bound, so that a resumed run may change it."""
        return f"GradientClipping:{type(self.rule).__name__}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Found Trainer(gradient_clip_val={trainer.gradient_clip_val}) beside {type(self).__name__}, expected "
                f"one of them: leave gradient_clip_val out, {self.rule!r} clips."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._module is not None and pl_module is not self._module:
            self._delicate = None
        if self._spares and self._delicate is None:
            self._delicate = delicate_parameters(pl_module, trainer.optimizers)
            _tell(self, self._delicate)
        others = [c for c in trainer.callbacks if isinstance(c, GradientClipping)]  # type: ignore[attr-defined]
        self._rate_name = "clip_rate" if len(others) < 2 else f"clip_rate_{type(self.rule).__name__}"
        self._is_first = others[0] is self
        self._module, self._rates = pl_module, {}
        self._choose(pl_module)

    def _choose(self, pl_module: LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        chosen = {*matching(named, self.exclude), *(self._delicate or [])}
        self._names = {id(p): name for name, p in named.items()}
        self._left_alone = frozenset(id(p) for name, p in named.items() if name in chosen)

    def on_gradients(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, gradients: Gradients
    ) -> None:
        logs = logs_this_step(trainer)
        if logs and self._is_first:
            log_now(trainer, pl_module, optimizer, self._norms(gradients))
        share = self.rule(gradients.without(self._left_alone))
        total, steps = self._rates.pop(id(optimizer), (torch.zeros_like(share), 0))
        self._rates[id(optimizer)] = total + share, steps + 1
        if logs:
            total, steps = self._rates.pop(id(optimizer))
            rate = trainer.strategy.reduce(total / steps, reduce_op="mean")
            log_now(trainer, pl_module, optimizer, {self._rate_name: rate})

    def _norms(self, gradients: Gradients) -> dict[str, Tensor | float]:
        found: dict[str, Tensor | float] = {"grad_norm": gradients.norm}
        if self.log_layers:
            found |= self._norms_of_layers(gradients)
        return found

    def _norms_of_layers(self, gradients: Gradients) -> dict[str, Tensor]:
        layers: dict[str, list[Tensor]] = {}
        for parameter, norm in zip(gradients.parameters, gradients.norms, strict=True):
            name = self._names.get(id(parameter), "unnamed")
            layers.setdefault(name.rpartition(".")[0] or name, []).append(norm)
        return {f"grad_norm_of_layer/{name}": total_norm(norms) for name, norms in layers.items()}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._delicate is None else {"left_alone": list(self._delicate)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._spares and "left_alone" in state_dict:
            self._delicate = list(state_dict["left_alone"])
            if self._module is not None:
                self._choose(self._module)


class AdaptiveGradientClipping(GradientClipping):
    """Keep each unit's gradient below a share of its weights (Brock et al. 2021, eq. 3).

    Parameters that start at zero, layers whose weights do (adaLN-zero, zero convolutions) and each optimizer's
    last layer are left alone: relative to nothing every gradient is too long, and they would hardly train. Which
    ones is decided when a training begins, told once, and kept in the checkpoint.

    When:   single layers whose gradients burst, large batches or rates; with plain SGD above all, for Adam undoes
            a scale that stays the same.
    Costs:  norms of weights and gradients.
    Knobs:  clip_factor, 0.01 for large batches, up to 0.16 for small ones.

    Args:
        clip_factor: largest norm of a unit's gradient relative to its weights'.
        eps: weights count as at least this long.
        by_unit: a unit is an output channel; false takes each parameter as a whole.
        exclude: patterns of parameters' names that are not clipped in addition.
        spare: leave output and zero-initialised layers alone.
        log_layers: also log train/grad_norm_of_layer/NAME.
    """

    def __init__(
        self,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        by_unit: bool = True,
        exclude: list[str] | None = None,
        spare: bool = True,
        log_layers: bool = False,
    ) -> None:
        super().__init__(Adaptive(clip_factor, eps, by_unit), exclude, log_layers)
        self._spares = spare


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those of the names that fit a pattern; every pattern has to fit one."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"exclude={list(patterns)}: no parameter is called {pattern!r}; the first of {len(names)} are "
                f"{names[:3]}. Write a pattern such as '*.bias' or 'network.head.*'."
            )
    return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}


def _tell(callback: GradientClipping, delicate: Sequence[str]) -> None:
    if delicate:
        more = f" and {len(delicate) - 4} more" if len(delicate) > 4 else ""
        rank_zero_info(
            f"{type(callback).__name__} leaves {len(delicate)} parameters alone, which start at zero or belong to "
            f"the output layer: {', '.join(delicate[:4])}{more}."
        )
