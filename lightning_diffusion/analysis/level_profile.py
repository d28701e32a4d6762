"""What a network meets at each noise level, before and while it takes its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_diffusion.analysis.drawn_data import DrawnData
from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.resume import RandomKey

_LEVELS = 15
_SAMPLES = 256  # that moments are of
_IMAGES = 32  # that gradients are of
_SECONDS = 20.0  # after which no further gradient is measured
_STEPS = 10
_DRAWS = 1001


class LevelProfile(NamedTuple):
    """By level, rising log-SNR (L,): deviations (root mean squares); levels as drawn (n,).

    Gradient norms (m,) are of the levels at `measured` (m,), m <= L: of fewer where measuring them took too long.
    """

    log_snr: Tensor
    inputs: Tensor
    residuals: Tensor
    outputs: Tensor
    measured: Tensor
    gradients: Tensor
    drawn: Tensor

    @property
    def typical_gradient(self) -> float:
        """The median norm over draws, between levels by interpolation."""
        norms = np.interp(self.drawn.numpy(), self.measured.numpy(), self.gradients.double().numpy())
        return float(np.median(norms))


def level_profile(module: Any, data: DrawnData, seed: int = 0, most_images: int = _IMAGES) -> LevelProfile:
    """Of a DiffusionModule whose representation is measured, at even steps between the ends of its draws.

    Args:
        module: on the device that is to compute; the profile itself is on the CPU.
        data: anywhere.
        seed: of the noise.
        most_images: that the network is given at once.
    """
    data = data.first(_SAMPLES).to(next(module.parameters()).device)
    objective, few = module.objective, data.first(min(_IMAGES, most_images))
    u = torch.tensor([0.999, 0.001], dtype=torch.float64)
    low, high = objective.density.quantile(u, objective.schedule).clamp(-20, 20).tolist()
    log_snr = torch.linspace(low, high, _LEVELS, dtype=torch.float64)
    moments: list[Tensor] = []
    gradients: list[tuple[float, float]] = []
    started = time.perf_counter()
    for number, one in enumerate(log_snr):
        moments.append(_moments(module, data, len(few.x0), one, RandomKey(seed, batch=number)).cpu())
        if not gradients or time.perf_counter() - started < _SECONDS:
            norm = gradient_norm(module, few, one, RandomKey(seed, batch=number))
            gradients.append((float(one), float(norm)))
    measured, norms = torch.tensor(gradients, dtype=torch.float64).unbind(1)
    u = (torch.arange(_DRAWS, dtype=torch.float64) + 0.5) / _DRAWS
    drawn = objective.density.quantile(u, objective.schedule).clamp(-20, 20)
    inputs, residuals, outputs = torch.stack(moments).float().unbind(1)
    return LevelProfile(log_snr, inputs, residuals, outputs, measured, norms, drawn)


@torch.no_grad()
def _moments(module: Any, data: DrawnData, number: int, log_snr: Tensor, key: RandomKey) -> Tensor:
    """Root mean squares of input, residual and output, the network's of the first `number` samples, (3,)."""
    preconditioning, level = module.objective.preconditioning, _level(module, log_snr, data)
    noise = _noise(data, key)
    x = per_sample(preconditioning.c_in(level), data.x0) * level.diffuse(data.x0, noise)
    residual = preconditioning.residual(data.x0, noise, level)
    few = data.first(number)
    output = module.network(x[:number], preconditioning.c_noise(level)[:number], **few.condition)
    return torch.stack([_rms(part) for part in (x, residual, output)])


def gradient_norm(module: Any, data: DrawnData, log_snr: Tensor, key: RandomKey) -> Tensor:
    """Of the loss as training weighs it, at one level, over all trained parameters, float64, shape ()."""
    level, noise = _level(module, log_snr, data), _noise(data, key)
    with torch.enable_grad():
        loss = module.objective.loss_at(module.network, data.x0, noise, level, data.condition).loss
        trained = [p for p in module.network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return sum(squares, torch.zeros((), dtype=torch.float64, device=data.x0.device)).sqrt()


def _noise(data: DrawnData, key: RandomKey) -> Tensor:
    """Drawn on the CPU, and so the same on every device."""
    drawn = torch.randn(data.x0.shape, generator=key.generator("examined noise"), dtype=data.x0.dtype)
    return drawn.to(data.x0.device)


def _level(module: Any, log_snr: Tensor, data: DrawnData) -> NoiseLevel:
    level: NoiseLevel = module.objective.schedule.at(log_snr[None]).to(data.x0)
    return level.expand(len(data.x0))


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


class LargestLogit(TorchFunctionMode):
    """Within it, `largest` is the largest |q k| scale of every scaled_dot_product_attention; 0 if there is none."""

    largest = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0].detach(), args[1].detach()
            scale = (kwargs or {}).get("scale") or q.shape[-1] ** -0.5
            self.largest = max(self.largest, float((q @ k.mT).abs().max()) * scale)
        return func(*args, **(kwargs or {}))


def attention_growth(patient: Patient, device: torch.device) -> tuple[float, float, int] | None:
    """Largest logits at the start and after some steps of the run's own optimizer, and how many; None without any."""
    module: Any = patient.prepared().to(device)
    with _watched() as start:
        _step(module, patient, 0, None)
    if not start.largest:
        return None
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    steps, began = 0, time.perf_counter()
    while steps < min(_STEPS, patient.steps) and time.perf_counter() - began < _SECONDS:
        _step(module, patient, steps, optimizer)
        steps += 1
    with _watched() as end:
        _step(module, patient, 0, None)
    return start.largest, end.largest, steps


@contextmanager
def _watched() -> Iterator[LargestLogit]:
    mode = LargestLogit()
    with mode:
        yield mode


def _step(module: Any, patient: Patient, number: int, optimizer: Any) -> None:
    data = patient.drawn
    size = min(_IMAGES, patient.batch_size, len(data.x0))
    start = number * size % max(1, len(data.x0) - size + 1)
    part = DrawnData(data.x0[start:], {n: c[start:] for n, c in data.condition.items()}).first(size)
    part = part.to(next(module.parameters()).device)
    key = RandomKey(patient.seed, batch=number)
    level, noise = module.objective.draw(part.x0, key)
    loss = module.objective.loss_at(module.network, part.x0, noise, level, part.condition).loss
    if optimizer is not None:
        _set_rate(module, optimizer, number, patient)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _set_rate(module: Any, optimizer: Any, number: int, patient: Patient) -> None:
    """The run's own learning rate at this step, its warm-up included."""
    images = patient.batch_size * patient.trainer.accumulate * patient.trainer.devices
    factor = module.learning_rate(number, patient.total_steps or 10**6, images)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
