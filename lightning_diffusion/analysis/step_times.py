"""Times of training steps, a few of each kind; a kind that is too slow is given up, one that fails did not run."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from lightning_diffusion.analysis.patient import Patient
from lightning_diffusion.noise_level import per_sample
from lightning_diffusion.resume import RandomKey

_SECONDS = 4.0  # for all steps of a kind
_PATIENCE = 8.0  # a kind whose next try is expected to take longer is given up
_STEPS = 7
_BATCHES = 8  # of the loader


class Kind(NamedTuple):
    """A way to compute the network: its number format, memory format, and whether compiled."""

    name: str
    precision: str = "32-true"
    channels_last: bool = False
    compiled: bool = False


class StepTimes(NamedTuple):
    """Seconds: of a micro-batch's whole step, of the network's forward and backward in it, of loading it.

    Workers load while the step is computed; without them one follows the other.
    """

    step: float
    network: float | None
    loading: float
    workers: int = 0

    @property
    def whole(self) -> float:
        """From one micro-batch to the next."""
        return max(self.step, self.loading) if self.workers else self.step + self.loading


def kinds(device: str) -> tuple[Kind, ...]:
    """Those worth trying on a device: compiling takes a minute on a CPU and is left out there."""
    last = (Kind("fp32, channels-last", channels_last=True), Kind("bf16, channels-last", "bf16-mixed", True))
    compiled = (Kind("bf16, compiled", "bf16-mixed", compiled=True),) if device == "cuda" else ()
    return Kind("fp32"), Kind("bf16", "bf16-mixed"), *last, *compiled


def kind_of(patient: Patient) -> Kind:
    """As the Trainer is told; float16 counts as bfloat16, which costs the same."""
    low = patient.trainer.precision in ("bf16-mixed", "16-mixed", "bf16-true", "16-true")
    return Kind("bf16", "bf16-mixed") if low else Kind("fp32")


def loading_time(patient: Patient) -> float:
    """Seconds per batch, without those that workers load ahead; of all batches where there are no others."""
    prefetched = workers(patient) * (getattr(patient.loader, "prefetch_factor", None) or 0)
    ahead = max(1, prefetched)
    arrived = [0.0, *_arrivals(patient.loader, ahead + _BATCHES)]
    first = ahead if len(arrived) > ahead + 1 else 0
    return (arrived[-1] - arrived[first]) / max(len(arrived) - 1 - first, 1)


def workers(patient: Patient) -> int:
    """Processes that load batches; 0 where the loader says nothing of any."""
    return int(getattr(patient.loader, "num_workers", 0))


def _arrivals(loader: Any, most: int) -> Iterator[float]:
    started = time.perf_counter()
    for _ in islice(loader, most):
        seconds = time.perf_counter() - started
        yield seconds
        if seconds > _PATIENCE:
            break


def step_time(patient: Patient, kind: Kind) -> float | None:
    """Seconds of loss, gradient and optimizer step of a full micro-batch; None for a kind too slow or that fails."""
    return _attempted(partial(_step_time, patient, kind))


def network_time(patient: Patient, kind: Kind) -> float | None:
    """Seconds of the network's forward and backward alone, on a full micro-batch; None where it fails."""
    return _attempted(partial(_network_time, patient, kind))


def _attempted(measure: Callable[[], float | None]) -> float | None:
    """None after a RuntimeError: out of memory, no compiler, an operator without this number format."""
    try:
        return measure()
    except RuntimeError:
        pass
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _step_time(patient: Patient, kind: Kind) -> float | None:
    """Batches of one, then of a quarter, lead up to it, so that hopeless kinds cost little."""
    step = _prepared(patient, kind)
    size = min(patient.batch_size, len(patient.drawn.x0))
    for lead in sorted({1, max(1, size // 4)} - {size}):
        seconds = min(_seconds(partial(step, lead)), _seconds(partial(step, lead)))
        if seconds * size / lead > _PATIENCE:
            return None
    step(size)
    return _least(partial(step, size))


def _network_time(patient: Patient, kind: Kind) -> float:
    device, module = patient.trainer.device, _made(patient, kind)
    data = patient.drawn.first(patient.batch_size).to(device)
    level, noise = module.objective.draw(data.x0, RandomKey(patient.seed))
    preconditioning = module.objective.preconditioning
    x = per_sample(preconditioning.c_in(level), data.x0) * level.diffuse(data.x0, noise)
    c_noise = preconditioning.c_noise(level)

    def once() -> None:
        with _autocast(kind, device):
            output = module.network(x, c_noise, **data.condition)
        output.float().square().mean().backward()

    once()
    return _least(once)


def _prepared(patient: Patient, kind: Kind) -> Callable[[int], None]:
    device, module = patient.trainer.device, _made(patient, kind)
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    drawn, numbers = patient.drawn.first(patient.batch_size).to(device), iter(range(10**9))

    def step(size: int) -> None:
        data, key = drawn.first(size), RandomKey(patient.seed, batch=next(numbers))
        with _autocast(kind, device):
            loss = module.objective.loss(module.network, data.x0, data.condition, key).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _made(patient: Patient, kind: Kind) -> Any:
    module: Any = copy.deepcopy(patient.prepared()).to(patient.trainer.device)
    if kind.channels_last:
        module.network.to(memory_format=torch.channels_last)
    if kind.compiled:
        module.network.compile()
    return module


def _autocast(kind: Kind, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if kind.precision == "bf16-mixed" else nullcontext()


def _least(run: Callable[[], None]) -> float:
    """The least is what other processes disturbed least."""
    return min(_repeated(run))


def _repeated(run: Callable[[], None]) -> Iterator[float]:
    total = 0.0
    for _ in range(_STEPS):
        seconds = _seconds(run)
        total += seconds
        yield seconds
        if total > _SECONDS:
            break


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
