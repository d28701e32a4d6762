"""Objectives of the literature with their defaults: a subclass with an `__init__`, nothing else."""

from __future__ import annotations

from lightning_diffusion.densities import Density, LogNormalSigma
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.preconditioning import DDPMPreconditioning, EDMPreconditioning, LogSigma, Timestep
from lightning_diffusion.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    Schedule,
)
from lightning_diffusion.stable_targets import StableTarget
from lightning_diffusion.targets import Epsilon, Flow, Target, V
from lightning_diffusion.time_densities import UniformTime
from lightning_diffusion.weightings import Constant, EDMWeighting, Uncertainty, Weighting


class EDM(DiffusionObjective):
    """Karras et al. 2022, Table 1, "Ours": unit variance everywhere, log-normal sigma.

    Args:
        sigma_data: deviation of the data (of what the representation puts out), zero mean.
        density: the default mean is for sigma_data = 0.5; add ln(sigma_data / 0.5) for others.
        weighting: 1 on the unit-variance residual.
        schedule: the range and spacing of sampling steps.
        stable_target: regress on the mean over many clean samples, while training.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        density: Density = LogNormalSigma(),
        weighting: Weighting = EDMWeighting(),
        schedule: Schedule = EDMSchedule(),
        stable_target: StableTarget | None = None,
    ) -> None:
        preconditioning = EDMPreconditioning(sigma_data=sigma_data)
        super().__init__(schedule, density, preconditioning, weighting, stable_target)


class DDPM(DiffusionObjective):
    """Ho et al. 2020: predict the noise on a table of 1000 levels, simple loss.

    Args:
        schedule: the table.
        target: what is predicted.
        weighting: constant on the target.
        density: which levels; all alike.
        stable_target: regress on the mean over many clean samples, while training.
    """

    def __init__(
        self,
        schedule: DiscreteSchedule = LinearSchedule(),
        target: Target = Epsilon(),
        weighting: Weighting = Constant(),
        density: Density = UniformTime(),
        stable_target: StableTarget | None = None,
    ) -> None:
        preconditioning = DDPMPreconditioning(target=target, c_noise=Timestep(schedule))
        super().__init__(schedule, density, preconditioning, weighting, stable_target)


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
        stable_target: StableTarget | None = None,
    ) -> None:
        super().__init__(schedule, target, weighting, density, stable_target)


class RectifiedFlow(DiffusionObjective):
    """Liu et al. 2023, Lipman et al. 2023: straight paths, predict the velocity eps - x_0.

    Args:
        density: over time; `LogitNormalTime` for that of Esser et al. 2024.
        weighting: constant on the velocity.
        schedule: the path, shifted for higher resolutions.
        sigma_data: deviation of the data, which should be that of the noise.
        stable_target: regress on the mean over many clean samples, while training.
    """

    def __init__(
        self,
        density: Density = UniformTime(),
        weighting: Weighting = Constant(),
        schedule: FlowSchedule = FlowSchedule(),
        sigma_data: float = 1.0,
        stable_target: StableTarget | None = None,
    ) -> None:
        preconditioning = DDPMPreconditioning(Flow(), sigma_data, LogSigma())
        super().__init__(schedule, density, preconditioning, weighting, stable_target)


class EDM2(EDM):
    """Karras et al. 2024: EDM with a learned weight of every noise level.

    Args: as EDM; the density is that of latents, -0.8 and 1.6 are those of 64 x 64 pixels.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        density: Density = LogNormalSigma(-0.4, 1.0),
        weighting: Weighting = Uncertainty(),
        schedule: Schedule = EDMSchedule(),
        stable_target: StableTarget | None = None,
    ) -> None:
        super().__init__(sigma_data, density, weighting, schedule, stable_target)
