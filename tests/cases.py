"""One list of everything, over which the tests are parametrised. `test_every_member_is_listed` keeps it complete."""

from __future__ import annotations

from torch import nn

import lightning_diffusion as ld

SCHEDULES = [
    ld.EDMSchedule(),
    ld.EDMSchedule(sigma_min=0.01, sigma_max=20.0, rho=1.0),
    ld.LinearSchedule(),
    ld.LinearSchedule(num_steps=50, beta_min=2e-3, beta_max=0.3),
    ld.LinearSchedule(zero_terminal_snr=True),
    ld.CosineSchedule(),
    ld.CosineSchedule(zero_terminal_snr=True),
    ld.ScaledLinearSchedule(),
    ld.ExponentialSchedule(),
    ld.SigmoidSchedule(zero_terminal_snr=True),
    ld.ContinuousCosineSchedule(),
    ld.GeometricSchedule(),
    ld.FlowSchedule(),
    ld.FlowSchedule(shift=3.0),
]
PURE_NOISE_AT_THE_END = [
    ld.LinearSchedule(zero_terminal_snr=True),
    ld.CosineSchedule(zero_terminal_snr=True),
    ld.SigmoidSchedule(zero_terminal_snr=True),
    ld.ContinuousCosineSchedule(),
    ld.FlowSchedule(),
    ld.FlowSchedule(shift=3.0),
]
DISCRETE = [schedule for schedule in SCHEDULES if isinstance(schedule, ld.DiscreteSchedule)]
DENSITIES = [
    ld.LogNormalSigma(),
    ld.LogNormalSigma(mean=0.4, std=0.7),
    ld.UniformTime(),
    ld.UniformTime(ld.CosineSchedule()),
    ld.UniformSigma(),
    ld.LogUniformSigma(0.01, 5.0),
    ld.Truncated(ld.LogNormalSigma(), -4.0, 6.0),
    ld.Importance(ld.LogNormalSigma(std=1.5), ld.LogNormalSigma()),
    ld.LogitNormalTime(),
    ld.LogitNormalTime(mean=-0.5, std=0.6),
    ld.NormalTime(),
    ld.CosMapTime(),
    ld.ModeTime(),
    ld.ModeTime(scale=-0.5),
    ld.TabulatedDensity((-6.0, -1.0, 0.0, 7.0), (-3.0, 0.0, 0.5, -4.0)),
    ld.TabulatedTime((1.0, 3.0, 2.0)),
    ld.AdaptiveDensity(),
    ld.AdaptiveDensity(ld.UniformTime(), floor=0.3, bins=10),
]
TARGETS = [ld.X0(), ld.Epsilon(), ld.V(), ld.Score(), ld.Flow()]
WEIGHTINGS = [
    ld.Constant(),
    ld.EDMWeighting(),
    ld.P2(),
    ld.P2(gamma=0.5),
    ld.SNRPower(),
    ld.SNRPower(gamma=0.5),
    ld.MinSNR(),
    ld.MaxSNR(),
    ld.SNRClip(),
    ld.LogSNR(),
    ld.SoftMinSNR(),
    ld.Debiased(),
    ld.Sigmoid(),
    ld.Sigmoid(bias=-2.0),
    ld.Uncertainty(),
]
PRECONDITIONINGS = [
    *(ld.EDMPreconditioning(target, sigma_data) for target in TARGETS for sigma_data in (0.5, 1.0, 3.0)),
    *(ld.DDPMPreconditioning(target) for target in TARGETS),
]
SAMPLERS = [
    ld.Euler(12),
    ld.Heun(12),
    ld.Heun(12, churn=ld.Churn(amount=5.0)),
    ld.DPMSolver2M(12),
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
CLIPPING_RULES = [
    ld.GlobalNorm(0.3),
    ld.ParameterGroupNorm(0.3),
    ld.ParameterNorm(0.3),
    ld.UnitNorm(0.3),
    ld.Value(0.3),
    ld.Adaptive(0.3),
    ld.Adaptive(0.3, by_unit=False),
    ld.Normalise(0.3),
]
REPRESENTATIONS = [ld.Identity(), ld.Standardize(), ld.LatentRepresentation(ld.PatchPCA())]
DIFFUSERS_UNET = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 4,
}
NETWORKS = [
    ld.DiffusersUNet(DIFFUSERS_UNET),
    ld.UNet((2, 8, 8), channels=8, num_blocks=1, num_classes=3, context_dim=6),
    ld.MagnitudePreservingUNet(
        (2, 8, 8),
        channels=8,
        multipliers=(1, 2),
        num_blocks=1,
        attention_levels=(1,),
        num_classes=3,
        head_channels=8,
    ),
    ld.DiT((2, 8, 8), 2, ld.DiTSize(16, 2, 2), num_classes=3),
    ld.DiT(
        (2, 8, 8),
        4,
        ld.DiTSize(16, 2, 4),
        num_classes=3,
        options=ld.DiTOptions.original(learned_variance=True),
    ),
]
FEATURE_EXTRACTORS = [
    ld.InceptionFeatures(),
    ld.ClassifierFeatures(),
    ld.ModuleFeatures(nn.Flatten(), "pixels", channels=1),
]
PRESETS = [ld.EDM, ld.DDPM, ld.VPrediction, ld.RectifiedFlow, ld.EDM2]

FAMILIES = {
    ld.Schedule: SCHEDULES,
    ld.Density: DENSITIES,
    ld.Target: TARGETS,
    ld.Weighting: WEIGHTINGS,
    ld.Preconditioning: PRECONDITIONINGS,
    ld.Sampler: SAMPLERS,
    ld.LearningRate: LEARNING_RATES,
    ld.Representation: REPRESENTATIONS,
    ld.ClippingRule: CLIPPING_RULES,
    ld.FeatureExtractor: FEATURE_EXTRACTORS,
    ld.Network: NETWORKS,
}


def refused(schedule: ld.Schedule, preconditioning: ld.Preconditioning) -> bool:
    """Whether the constructor of the objective has to refuse the pair: no data in the target at zero SNR."""
    plain = isinstance(preconditioning, ld.DDPMPreconditioning)
    return (
        plain and preconditioning.target in (ld.Epsilon(), ld.Score()) and schedule in PURE_NOISE_AT_THE_END
    )
