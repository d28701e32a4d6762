"""Train diffusion models stably and efficiently with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "noise_level": ["NoiseLevel"],
    "processes": ["Schedule", "StraightPath", "VarianceExploding", "VariancePreserving"],
    "schedules": [
        "ContinuousCosineSchedule",
        "CosineSchedule",
        "DiscreteSchedule",
        "EDMSchedule",
        "ExponentialSchedule",
        "FlowSchedule",
        "GeometricSchedule",
        "LinearSchedule",
        "ScaledLinearSchedule",
        "SigmoidSchedule",
    ],
    "adaptive_density": ["AdaptiveDensity"],
    "tabulated_densities": ["TabulatedDensity", "TabulatedTime"],
    "densities": ["Density", "Importance", "LogNormalSigma", "LogUniformSigma", "Truncated", "UniformSigma"],
    "time_densities": [
        "CosMapTime",
        "LogitNormalTime",
        "ModeTime",
        "NormalTime",
        "TimeDensity",
        "UniformTime",
    ],
    "weightings": [
        "Constant",
        "Debiased",
        "EDMWeighting",
        "LogSNR",
        "MaxSNR",
        "MinSNR",
        "P2",
        "SNRClip",
        "SNRPower",
        "SNRWeighting",
        "Sigmoid",
        "SoftMinSNR",
        "Uncertainty",
        "Weighting",
    ],
    "targets": ["X0", "Epsilon", "Flow", "Score", "Target", "V"],
    "preconditioning": [
        "DDPMPreconditioning",
        "EDMPreconditioning",
        "LogSigma",
        "Preconditioning",
        "Timestep",
    ],
    "stable_targets": ["StableTarget"],
    "objective": ["DiffusionObjective"],
    "presets": ["DDPM", "EDM", "EDM2", "RectifiedFlow", "VPrediction"],
    "representation": ["Identity", "Representation", "Standardize"],
    "autoencoders": ["Autoencoder", "DiffusersAutoencoder", "PretrainedAutoencoder"],
    "patch_pca": ["PatchPCA"],
    "latent": ["LatentRepresentation"],
    "networks": ["DiT", "DiTOptions", "DiTSize", "MagnitudePreservingUNet", "Network", "UNet"],
    "learning_rates": [
        "LearningRate",
        "TakenStepsLR",
        "WarmupConstant",
        "WarmupCosine",
        "WarmupInverseSquareRoot",
        "WarmupLinear",
    ],
    "sampling": ["DDIM", "Ancestral", "Churn", "DPMSolver2M", "Euler", "Heun", "Sampler"],
    "guidance": ["ClassifierFree", "Guidance"],
    "autoguidance": ["AutoGuidance"],
    "diffusers_models": ["DiffusersUNet"],
    "exported": ["export_safetensors", "load_module"],
    "exporting": ["export_diffusers", "export_program"],
    "pretrained": ["load_network"],
    "features": ["FeatureExtractor", "InceptionFeatures", "ModuleFeatures"],
    "classifier_features": ["ClassifierFeatures"],
    "adapters": ["dit_from_state_dict", "edm2_from_state_dict"],
    "module": ["DiffusionModule"],
    "loss_scaling": ["LossScaling"],
    "precision": ["DiffusionFSDPPrecision", "DiffusionPrecision"],
    "fsdp2": ["FSDP2Strategy"],
    "resume": ["RandomKey", "ResumableSampler"],
    "io": ["AtomicCheckpointIO"],
    "averaging": ["load_averaged"],
    "gradients": [
        "Adaptive",
        "ClippingRule",
        "GlobalNorm",
        "Normalise",
        "ParameterGroupNorm",
        "ParameterNorm",
        "UnitNorm",
        "Value",
    ],
    "recorder": ["Snapshots"],
    "spikes": ["SpikeRule"],
    "profiles": ["FixedDecay", "HalfLife", "InverseGamma", "PowerFunction", "Profile", "RatioWarmup"],
    "analysis.information": ["GaussianMixture", "information_curves"],
    "analysis.decoders": ["DiscreteDecoder", "GaussianDecoder"],
    "analysis.likelihood": ["LikelihoodBound", "likelihood_bound", "module_likelihood_bound"],
    "analysis.mmse": ["MMSECurve", "exact_mmse_curve", "mmse_curve", "module_mmse_curve"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(["__version__", *_MODULE_OF])


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that the command line's help needs no torch (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
