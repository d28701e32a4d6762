"""Objectives of the literature with their defaults: a subclass with an `__init__`, nothing else."""

from __future__ import annotations

from lightning_diffusion.densities import Density, LogNormalSigma
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.preconditioning import DDPMPreconditioning, EDMPreconditioning, Timestep
from lightning_diffusion.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    LinearSchedule,
    Schedule,
)
from lightning_diffusion.targets import Epsilon, Target, V
from lightning_diffusion.time_densities import UniformTime
from lightning_diffusion.weightings import Constant, EDMWeighting, Weighting


class EDM(DiffusionObjective):
    """Karras et al. 2022, Table 1, "Ours": unit variance everywhere, log-normal sigma.

    Args:
        sigma_data: deviation of the data (of what the representation puts out), zero mean.
        density: the default mean is for sigma_data = 0.5; add ln(sigma_data / 0.5) for others.
        weighting: 1 on the unit-variance residual.
        schedule: the range and spacing of sampling steps.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        density: Density = LogNormalSigma(),
        weighting: Weighting = EDMWeighting(),
        schedule: Schedule = EDMSchedule(),
    ) -> None:
        super().__init__(schedule, density, EDMPreconditioning(sigma_data=sigma_data), weighting)


class DDPM(DiffusionObjective):
    """Ho et al. 2020: predict the noise on a table of 1000 levels, simple loss.

    Args:
        schedule: the table.
        target: what is predicted.
        weighting: constant on the target.
        density: which levels; all alike.
    """

    def __init__(
        self,
        schedule: DiscreteSchedule = LinearSchedule(),
        target: Target = Epsilon(),
        weighting: Weighting = Constant(),
        density: Density = UniformTime(),
    ) -> None:
        preconditioning = DDPMPreconditioning(target=target, c_noise=Timestep(schedule))
        super().__init__(schedule, density, preconditioning, weighting)


class VPrediction(DDPM):
    """Salimans & Ho 2022: predict v = alpha eps - sigma x_0 on the cosine table.

    Args: as DDPM.
    """

    def __init__(
        self,
        schedule: DiscreteSchedule = CosineSchedule(),
        target: Target = V(),
        weighting: Weighting = Constant(),
        density: Density = UniformTime(),
    ) -> None:
        super().__init__(schedule, target, weighting, density)
