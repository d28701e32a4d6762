"""The scheduler of diffusers that does what an objective and a sampler do here."""

from __future__ import annotations

from typing import Any

from lightning_diffusion.diffusers_models import import_diffusers
from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.preconditioning import DDPMPreconditioning, EDMPreconditioning, LogSigma, Timestep
from lightning_diffusion.sampling import DDIM, DPMSolver2M, Euler, Sampler
from lightning_diffusion.schedules import DiscreteSchedule, EDMSchedule
from lightning_diffusion.targets import X0, Epsilon, V

_PREDICTIONS = {Epsilon: "epsilon", V: "v_prediction", X0: "sample"}


def scheduler_for(objective: DiffusionObjective, sampler: Sampler, clipped: bool) -> Any:
    """A scheduler of diffusers whose steps are those of `sampler`.

        EDM preconditioning on EDMSchedule          EDMDPMSolverMultistepScheduler
        a table, the target itself predicted        DPMSolverMultistepScheduler
        the same with zero terminal SNR             DDIMScheduler, first order only; where guesses are clipped its step
                                                    wants use_clipped_model_output=True

    Args:
        objective: whose levels and coefficients.
        sampler: Euler, DDIM without noise, or DPMSolver2M; the number of steps is told when drawing.
        clipped: whether guesses of clean data are held within [-1, 1].

    Raises:
        ValueError: for what diffusers has nothing for.
    """
    order, preconditioning = _order(sampler), objective.preconditioning
    if isinstance(preconditioning, EDMPreconditioning) and preconditioning.c_noise == LogSigma():
        if isinstance(objective.schedule, EDMSchedule):
            return _edm(objective.schedule, preconditioning.sigma_data, order, clipped)
    elif isinstance(preconditioning, DDPMPreconditioning) and isinstance(
        objective.schedule, DiscreteSchedule
    ):
        prediction = _PREDICTIONS.get(type(preconditioning.target))
        if prediction and preconditioning.c_noise == Timestep(objective.schedule):
            return _table(objective.schedule, prediction, order, clipped)
    raise ValueError(
        f"diffusers has no scheduler for {type(objective).__name__} with {preconditioning} on {objective.schedule}: "
        "expected EDM preconditioning on EDMSchedule, or a table with timesteps and target Epsilon, V or X0, as the "
        "presets EDM, EDM2, DDPM and VPrediction. Export to safetensors or torch-export."
    )


def _order(sampler: Sampler) -> int:
    if isinstance(sampler, DPMSolver2M):
        return 2
    if isinstance(sampler, Euler) or (isinstance(sampler, DDIM) and sampler.eta == 0):
        return 1
    raise ValueError(
        f"diffusers has no scheduler for {sampler} on these levels: expected Euler, DPMSolver2M or DDIM with eta=0."
    )


def _edm(schedule: EDMSchedule, sigma_data: float, order: int, clipped: bool) -> Any:
    return import_diffusers().EDMDPMSolverMultistepScheduler(
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        sigma_data=sigma_data,
        rho=schedule.rho,
        solver_order=order,
        thresholding=clipped,
        final_sigmas_type="zero",
    )


def _table(schedule: DiscreteSchedule, prediction: str, order: int, clipped: bool) -> Any:
    diffusers = import_diffusers()
    common = {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
    }
    if not schedule.reaches_zero_snr:
        return diffusers.DPMSolverMultistepScheduler(
            **common, solver_order=order, thresholding=clipped, final_sigmas_type="zero"
        )
    if order == 1:
        return diffusers.DDIMScheduler(**common, clip_sample=clipped, set_alpha_to_one=True)
    raise ValueError(
        f"diffusers has no second-order scheduler that starts from pure noise, as {schedule} does: choose Euler."
    )
