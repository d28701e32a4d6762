r"""The one place where the knobs meet: loss and denoise.

    x_0   clean data, float32, zero mean, deviation sigma_data        shape (B, ...)
    x_t   = alpha x_0 + sigma eps                                     shape (B, ...)
    loss  = mean over samples and elements of w |F - R|^2

The network's call runs in whatever precision the Trainer sets; all else is float32 (float64 for float64 data).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_diffusion.batches import LABEL
from lightning_diffusion.densities import Density, Importance, intended_by
from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.preconditioning import Preconditioning
from lightning_diffusion.recording import Recorded
from lightning_diffusion.resume import RandomKey
from lightning_diffusion.schedules import Schedule
from lightning_diffusion.stable_targets import References, StableTarget
from lightning_diffusion.tabulated_densities import integral, support, tabulate, tabulate_entries
from lightning_diffusion.targets import Space
from lightning_diffusion.weightings import EDMWeighting, Setting, Weighting

Condition = Mapping[str, Tensor]


class Report(NamedTuple):
    """What a loss was made of: loss () as minimised, per_sample (B,) weighted, and the levels."""

    loss: Tensor
    per_sample: Tensor
    level: NoiseLevel

    def detach(self) -> Report:
        """The same without its graph."""
        return Report(self.loss.detach(), self.per_sample.detach(), self.level)


class DiffusionObjective(Recorded, nn.Module):
    """Which levels, which weight, which target, which coefficients.

    Args:
        schedule: the noise process.
        density: where on the log-SNR axis training draws.
        preconditioning: the network's inputs and outputs; carries the target and sigma_data.
        weighting: how much each level counts.
        stable_target: regress, while training, on the mean over many clean samples; None on the one alone.

    Raises:
        ValueError: where the target loses the data at a level of the schedule; for a density that draws nothing
            within the schedule's range, or leaves out what it stands for.
    """

    def __init__(
        self,
        schedule: Schedule,
        density: Density,
        preconditioning: Preconditioning,
        weighting: Weighting,
        stable_target: StableTarget | None = None,
    ) -> None:
        super().__init__()
        preconditioning.check(schedule)
        density.check(schedule)
        self.schedule = schedule
        self.density = copy.deepcopy(density)
        self.preconditioning = copy.deepcopy(preconditioning)
        self.weighting = copy.deepcopy(weighting)
        self.stable_target = copy.deepcopy(stable_target)

    @property
    def sigma_data(self) -> float:
        """The deviation of the data that the objective assumes."""
        return self.preconditioning.sigma_data

    def loss(
        self, network: nn.Module, x0: Tensor, condition: Condition | None = None, key: RandomKey | None = None
    ) -> Report:
        """Draw levels and noise and measure the weighted error of the network.

        `key` says where in the run, so that it can be resumed; without one, torch's global generator decides.
        """
        references = None
        if self.stable_target is not None and self.training:
            null = getattr(network, "num_classes", None)
            references = self.stable_target.references(at_least_float32(x0), condition or {}, null)
            x0 = self.stable_target.trained(x0)
            condition = {name: self.stable_target.trained(c) for name, c in (condition or {}).items()}
        key = key or RandomKey(epoch=int(torch.randint(2**62, ())))
        level, noise = self.draw(x0, key)
        report = self.loss_at(network, x0, noise, level, condition, references)
        if self.density.learns and self.training and torch.is_grad_enabled():
            self._observe(report.detach(), key)
        return report

    def draw(self, x0: Tensor, key: RandomKey) -> tuple[NoiseLevel, Tensor]:
        """Stratified levels and this rank's noise for a batch x0 of shape (B, ...)."""
        x0 = at_least_float32(x0)
        level = self.schedule.at(self.density.draw(len(x0), self.schedule, key)).to(x0)
        generator = key.local_generator("noise", x0.device)
        return level, torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)

    def loss_at(
        self,
        network: nn.Module,
        x0: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        references: References | None = None,
    ) -> Report:
        """The loss with levels and noise given: traceable by torch.compile, no host synchronisation."""
        x0 = at_least_float32(x0)
        c_noise = self.preconditioning.c_noise(level)
        output = self._output(network, level.diffuse(x0, noise), level, c_noise, condition)
        if references is not None and self.stable_target is not None:
            label = (condition or {}).get(LABEL)
            x0, noise = self.stable_target.posterior(x0, noise, level, references, label)
        error = output - self.preconditioning.residual(x0, noise, level)
        weighted = self.weight(level) * error.square().flatten(1).mean(1)
        minimised = self.weighting.combine(weighted, c_noise)
        importance = self.density.importance(level.log_snr, self.schedule)
        minimised = minimised if importance is None else minimised * importance
        return Report(minimised.mean(), weighted, level)

    def denoise(
        self, network: nn.Module, x_t: Tensor, level: NoiseLevel, condition: Condition | None = None
    ) -> Tensor:
        """x_0_hat = E[x_0 | x_t] as the network has learned it, shape (B, ...), float32."""
        x_t = at_least_float32(x_t)
        c_noise = self.preconditioning.c_noise(level)
        output = self._output(network, x_t, level, c_noise, condition)
        return self.preconditioning.to_x0(output, x_t, level)

    def weight(self, level: NoiseLevel) -> Tensor:
        """The weight on the network's own squared error, carried from the space that it is stated in, shape (B,).

        Importance weights of the density are no part of it, nor of `Report.per_sample`, only of the loss.
        """
        weight = self.weighting(level, self._setting)
        stated, own = self.weighting.space, self.preconditioning.output_space
        if stated is not own:
            D = self.preconditioning.determinant
            weight = weight * (D(stated, level) / D(own, level)) ** 2
        return weight

    def effective_weight(self, log_snr: Tensor, normalize: bool = False) -> Tensor:
        """What is trained on, on the axis that all objectives share: omega(log_snr), (B,) to (B,).

            loss = integral of omega(log_snr) E|R - R_hat|^2 d log_snr        R the residual of unit variance

        Density times weight; importance weights cancel. Two objectives train the same thing if their curves are
        proportional, whatever the process, target, coefficients and density (for data of other deviations over
        log_snr + 2 ln sigma_data). The entries of a table count by the width of their cells.

        Args:
            log_snr: where.
            normalize: divide by the integral over all that is drawn.
        """
        omega = self._weight_on_residual(log_snr) * self.density.log_prob(log_snr, self.schedule).exp()
        if not normalize:
            return omega
        density = intended_by(self.density)
        return omega / integral(self.effective_weight, *support(density, self.schedule)).to(omega)

    def with_density(self, density: Density) -> DiffusionObjective:
        """The same objective with samples drawn elsewhere: the expected gradient stays, its variance does not.

        Args:
            density: where samples fall; an entry of a table counts as its cell, and a cell as its entry.

        Raises:
            ValueError: if it leaves out more than a thousandth of what the present density intends.
        """
        return self._changed(density=Importance(density, intended_by(self.density)))

    def absorb_weight(self) -> DiffusionObjective:
        """The same objective with its weight moved into the density; what remains is constant on the residual.

        The gradient's expectation stays, to within the interpolation between 1025 knots (1e-4), or exactly on a table.
        Its variance falls only where the network is fully preconditioned: a network that predicts epsilon itself then
        draws few samples of high noise with a large weight each (80 times the variance of DDPM in 64 dimensions).

        Raises:
            ValueError: for a weighting that is learned, as the density would not follow it.
        """
        if isinstance(self.weighting, nn.Module):
            raise ValueError(
                f"{type(self.weighting).__name__} changes while it is trained; a density would not follow it. "
                "Draw where gradients are large by AdaptiveDensity instead, or choose a fixed weighting."
            )
        intended = intended_by(self.density)
        density = tabulate_entries(self._weight_on_residual, intended, self.schedule) or tabulate(
            self.effective_weight, intended, self.schedule
        )
        return self._changed(density=density, weighting=EDMWeighting(density.total))

    def _changed(self, **parts: Any) -> DiffusionObjective:
        names = ("schedule", "density", "preconditioning", "weighting", "stable_target")
        return DiffusionObjective(**{name: getattr(self, name) for name in names} | parts)

    @torch.no_grad()
    def _weight_on_residual(self, log_snr: Tensor) -> Tensor:
        level, D = self.schedule.at(log_snr), self.preconditioning.determinant
        own = D(self.preconditioning.output_space, level) / D(Space.RESIDUAL, level)
        return self.weight(level) * self._slope(level) * own**2

    def _slope(self, level: NoiseLevel) -> Tensor:
        """What a learned weighting makes of a weighted loss: d minimised / d weighted, shape (B,)."""
        c_noise, one = self.preconditioning.c_noise(level), torch.ones_like(level.sigma)
        return self.weighting.combine(one, c_noise) - self.weighting.combine(torch.zeros_like(one), c_noise)

    @torch.no_grad()
    def _observe(self, report: Report, key: RandomKey) -> None:
        """Tell the density the squared gradient of each sample's loss with respect to the output, but for a factor."""
        gradient = self.weight(report.level) * self._slope(report.level) ** 2 * report.per_sample
        self.density.observe(report.level.log_snr, gradient, self.schedule, key)

    @property
    def _setting(self) -> Setting:
        return Setting(self.sigma_data, lambda log_snr: self.density.log_prob(log_snr, self.schedule))

    def _output(
        self, network: nn.Module, x_t: Tensor, level: NoiseLevel, c_noise: Tensor, condition: Condition | None
    ) -> Tensor:
        x = (per_sample(self.preconditioning.c_in(level), x_t) * x_t).to(_weight_dtype(network, x_t.dtype))
        output: Tensor = network(x, c_noise, **(condition or {}))
        return output.to(x_t.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _weight_dtype(network: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a network kept in low precision wants its input in."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), default)
