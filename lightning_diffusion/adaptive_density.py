r"""A density that learns where samples are worth their cost, without changing what is trained.

    p        the intended density, cut into strata of equal mass p_k
    q        where samples fall, p times a multiplier m_k in stratum k, sum_k p_k m_k = 1
    g        the gradient of a sample's loss
    Var      of the mean of (p / q) g, the same in expectation for every q, is least for q ~ p sqrt(E[|g|^2 | log_snr])

Of g the gradient with respect to the network's output stands for the whole: |dl/dF|^2 = 4 (w / D)^2 |F - R|^2 in D
dimensions with w the weight, D constant. What follows, the network's own Jacobian, hardly depends on the level as its
inputs have unit variance. The loss itself would be another choice (Kingma & Gao 2023, appendix F, draw in proportion
to it), but it is the squared error once more than the gradient is: for a trained DDPM sqrt(E|g|^2) falls over the
levels by a factor of 9, sqrt(E|dl/dF|^2) by 14, sqrt(E[l^2]) by 160 (benchmarks/density_variance.py). Variance of the
gradient falls there by 41 %, for v on a cosine by 5 %; where loss is even over the levels already (EDM, a flow)
nothing is to be gained, and 1 or 2 % are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffusion.densities import Density, LogNormalSigma, check_plain
from lightning_diffusion.recording import Recorded
from lightning_diffusion.resume import RandomKey
from lightning_diffusion.schedules import Schedule

_PRIOR = 4.0  # samples of average gradient that stand in while a stratum has few of its own
_TINY = 1e-30


class AdaptiveDensity(Recorded, nn.Module, Density):
    """Draws more where gradients are large; importance weights keep their expectation that of `intended`.

    Learns from every optimizer step of a training: a step's statistics are summed over all processes (one all-reduce
    of 2 * bins numbers) and take effect in the next. All is done on the device, without waiting for it. In evaluation
    mode it is the intended density. Saved with the network; a resumed run draws what an uninterrupted one would.

    Args:
        intended: what the training means.
        floor: every level is drawn at least this share as often as intended, so weights are at most 1 / floor.
        bins: strata of equal intended mass.
        half_life: samples, over all processes, after which an observation counts half.

    Raises:
        ValueError: for numbers out of range; for an intended density that stands for another itself.
    """

    stands_for_another = True
    learns = True
    multiplier: Tensor
    seen: Tensor
    pending: Tensor

    def __init__(
        self,
        intended: Density = LogNormalSigma(),
        floor: float = 0.1,
        bins: int = 64,
        half_life: float = 20_000,
    ) -> None:
        super().__init__()
        check_plain(self, intended)
        if not (0 < floor <= 1 and bins >= 1 and half_life > 0):
            raise ValueError(
                f"Found floor={floor}, bins={bins}, half_life={half_life}; expected 0 < floor <= 1, at least 1 bin "
                "and a positive number of samples."
            )
        self.intended, self.floor, self.bins, self.half_life = intended, floor, bins, half_life
        self.register_buffer("multiplier", torch.ones(bins))
        self.register_buffer("seen", torch.zeros(2, bins))  # sums of squared gradients, counts
        self.register_buffer("pending", torch.zeros(2, bins))  # of one whole optimizer step
        self._step: tuple[int, int] | None = None  # the one that is pending: epoch, index
        self._partial: Tensor | None = None  # of this process, in the present step

    def extra_repr(self) -> str:
        return f"{self.intended}, floor={self.floor}, bins={self.bins}, half_life={self.half_life}"

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.intended.quantile(self._warp(u, schedule) if self.training else u, schedule)

    def log_prob(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        return self.intended.log_prob(log_snr, schedule)

    def importance(self, log_snr: Tensor, schedule: Schedule) -> Tensor | None:
        if not self.training:
            return None
        return 1 / self.multiplier.to(log_snr)[self._stratum(log_snr, schedule)]

    def draw(self, batch: int, schedule: Schedule, key: RandomKey) -> Tensor:
        if self.training and torch.is_grad_enabled() and self._step not in (None, _step_of(key)):
            self._learn(schedule)
        return super().draw(batch, schedule, key)

    @torch.no_grad()
    def observe(self, log_snr: Tensor, gradient: Tensor, schedule: Schedule, key: RandomKey) -> None:
        stratum = self._stratum(log_snr, schedule)
        member = stratum[:, None] == torch.arange(self.bins, device=log_snr.device)
        usable = gradient.isfinite()
        pair = torch.stack([gradient.where(usable, 0.0), usable.to(gradient)])
        sums = (pair[:, :, None] * member).sum(1).to(self.seen)  # in a fixed order, unlike index_add_
        if key.batch % key.accumulate and self._partial is not None:
            sums = sums + self._partial
        self._partial = sums
        if key.batch % key.accumulate == key.accumulate - 1:
            self.pending.copy_(_over_processes(sums, key))
            self._step, self._partial = _step_of(key), None

    def check(self, schedule: Schedule) -> None:
        self.intended.check(schedule)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._step or (-1, -1))

    def set_extra_state(self, state: Any) -> None:
        epoch, step = state.tolist()
        self._step, self._partial = (epoch, step) if epoch >= 0 else None, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptiveDensity:
        """Move with the module, but stay in float32, whatever precision the network is kept in."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @torch.no_grad()
    def _learn(self, schedule: Schedule) -> None:
        """Fold the finished step into the statistics, and draw accordingly from now on."""
        decay = 0.5 ** (self.pending[1].sum() / self.half_life)
        self.seen.mul_(decay).add_(self.pending)
        total, count = self.seen
        typical = total.sum() / count.sum().clamp(min=1)
        prior = _PRIOR**2 / (_PRIOR + count)
        size = ((total + prior * typical) / (count + prior) + _TINY).sqrt()
        mass = _strata(self.intended, schedule, self.bins)[1].to(size)
        self.multiplier.copy_(self.floor + (1 - self.floor) * size / (mass * size).sum())
        self.pending.zero_()
        self._step = None

    def _warp(self, u: Tensor, schedule: Schedule) -> Tensor:
        """From shares of q to shares of p, float64, shape (B,)."""
        home = self.multiplier.device if self.multiplier.device.type != "mps" else "cpu"
        u = u.to(home, non_blocking=True)
        mass = _strata(self.intended, schedule, self.bins)[1].to(home, non_blocking=True)
        drawn = mass * self.multiplier.to(mass)
        ends, own = drawn.cumsum(0), mass.cumsum(0)
        target = u * ends[-1]
        k = torch.searchsorted(ends[:-1].contiguous(), target, right=True)
        inside = (target - (ends - drawn)[k]) / drawn[k].clamp(min=_TINY)
        return ((own - mass)[k] + mass[k] * inside.clamp(0, 1)).clamp(1e-12, 1 - 1e-12)

    def _stratum(self, log_snr: Tensor, schedule: Schedule) -> Tensor:
        borders = _strata(self.intended, schedule, self.bins)[0].to(log_snr, non_blocking=True)
        return torch.searchsorted(borders, -log_snr, right=True)


@lru_cache
def _strata(intended: Density, schedule: Schedule, bins: int) -> tuple[Tensor, Tensor]:
    """Borders between strata as rising negative log-SNRs (bins - 1,), and intended masses (bins,), float64.

    A border lies half-way between neighbouring entries of a table, so that none is cut in two.
    """
    share = torch.arange(1, bins, dtype=torch.float64) / bins
    entry = intended.quantile(share, schedule)
    above = intended.share_above(entry - 1e-9, schedule)
    following = intended.quantile((above + 1e-9).clamp(max=1 - 1e-12), schedule)
    border = (entry + following) / 2
    above = intended.share_above(border, schedule)
    ends = torch.cat([torch.zeros(1), above, torch.ones(1)]).to(share)
    return -border, ends.diff().clamp(min=0)


def _step_of(key: RandomKey) -> tuple[int, int]:
    return key.epoch, key.batch // key.accumulate


def _over_processes(sums: Tensor, key: RandomKey) -> Tensor:
    if key.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
