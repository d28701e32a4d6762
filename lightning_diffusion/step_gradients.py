"""The gradients that an optimizer is about to use, unscaled once and shared by all that look at them.

A fused optimizer under a gradient scaler would divide by the loss scale inside its step only: here they are divided
before, once, and the scaler then tells the optimizer not to do it again.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_diffusion.norms import Gradients

_SHARED: WeakKeyDictionary[Optimizer, tuple[int, Gradients]] = WeakKeyDictionary()


def step_gradients(optimizer: Optimizer, step: int, scaler: Any = None, by_unit: bool = False) -> Gradients:
    """Unscaled gradients of the optimizer's next step, the same object for all that ask in this step.

    Args:
        optimizer: between backward and its step.
        step: a number that no other step of this optimizer has.
        scaler: a torch.amp.GradScaler, None where gradients are not scaled.
        by_unit: whether one of those who ask needs norms of units.
    """
    known = _SHARED.get(optimizer)
    if known is not None and known[0] == step:
        return known[1]
    gradients = Gradients((group["params"] for group in optimizer.param_groups), by_unit)
    if scaler is not None and len(gradients):
        unscale_(scaler, optimizer)
    _SHARED[optimizer] = step, gradients
    return gradients


def forget_gradients() -> None:
    """There are new gradients: whatever is known of the old ones is void."""
    _SHARED.clear()


def unscale_(scaler: Any, optimizer: Optimizer) -> None:
    """Divide by the loss scale, unless that was done since the last step."""
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
