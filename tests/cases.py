"""One list of everything, over which the tests are parametrised. `test_every_member_is_listed` keeps it complete."""

from __future__ import annotations

import lightning_diffusion as ld

SCHEDULES = [
    ld.EDMSchedule(),
    ld.EDMSchedule(sigma_min=0.01, sigma_max=20.0, rho=1.0),
    ld.LinearSchedule(),
    ld.LinearSchedule(num_steps=50, beta_min=2e-3, beta_max=0.3),
    ld.LinearSchedule(zero_terminal_snr=True),
    ld.CosineSchedule(),
    ld.CosineSchedule(zero_terminal_snr=True),
]
DISCRETE = [schedule for schedule in SCHEDULES if isinstance(schedule, ld.DiscreteSchedule)]
DENSITIES = [
    ld.LogNormalSigma(),
    ld.LogNormalSigma(mean=0.4, std=0.7),
    ld.UniformTime(),
    ld.UniformTime(ld.CosineSchedule()),
]
TARGETS = [ld.X0(), ld.Epsilon(), ld.V()]
WEIGHTINGS = [ld.Constant(), ld.EDMWeighting()]
PRECONDITIONINGS = [
    *(ld.EDMPreconditioning(target, sigma_data) for target in TARGETS for sigma_data in (0.5, 1.0, 3.0)),
    *(ld.DDPMPreconditioning(target) for target in TARGETS),
]
SAMPLERS = [
    ld.Euler(12),
    ld.Heun(12),
    ld.Heun(12, churn=ld.Churn(amount=5.0)),
    ld.DDIM(12),
    ld.DDIM(12, eta=0.5),
    ld.Ancestral(12),
]
LEARNING_RATES = [
    ld.WarmupConstant(),
    ld.WarmupLinear(),
    ld.WarmupCosine(),
    ld.WarmupInverseSquareRoot(warmup_images=0, reference_steps=100),
]
PRESETS = [ld.EDM, ld.DDPM, ld.VPrediction]

FAMILIES = {
    ld.Schedule: SCHEDULES,
    ld.Density: DENSITIES,
    ld.Target: TARGETS,
    ld.Weighting: WEIGHTINGS,
    ld.Preconditioning: PRECONDITIONINGS,
    ld.Sampler: SAMPLERS,
    ld.LearningRate: LEARNING_RATES,
}


def refused(schedule: ld.Schedule, preconditioning: ld.Preconditioning) -> bool:
    """Whether the constructor of the objective has to refuse the pair: no data in the target at zero SNR."""
    plain_noise = (
        isinstance(preconditioning, ld.DDPMPreconditioning) and preconditioning.target == ld.Epsilon()
    )
    return plain_noise and schedule in (
        ld.LinearSchedule(zero_terminal_snr=True),
        ld.CosineSchedule(zero_terminal_snr=True),
    )
