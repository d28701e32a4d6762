"""The objectives of the literature that are shipped, to compare others with."""

from __future__ import annotations

from lightning_diffusion.objective import DiffusionObjective
from lightning_diffusion.presets import DDPM, EDM, EDM2, RectifiedFlow, VPrediction
from lightning_diffusion.schedules import CosineSchedule
from lightning_diffusion.weightings import P2, MinSNR


def shipped_objectives() -> dict[str, DiffusionObjective]:
    """By name."""
    return {
        "DDPM": DDPM(),
        "DDPM, cosine": DDPM(CosineSchedule()),
        "P2": DDPM(weighting=P2()),
        "min-SNR": VPrediction(weighting=MinSNR()),
        "v": VPrediction(),
        "flow": RectifiedFlow(),
        "EDM": EDM(),
        "EDM2's density": EDM2(weighting=EDM().weighting),
    }
