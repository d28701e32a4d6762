"""What a network meets over log-SNR, in a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_diffusion.analysis.level_profile import LevelProfile
from lightning_diffusion.plots import ink, label_right, plain_logarithmic, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def conditioning_chart(profile: LevelProfile) -> Figure:
    """Deviations of input and regression target over log-SNR (band: 0.5 to 2), and gradient norms below."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.axhspan(0.5, 2, color="0.5", alpha=0.15, linewidth=0)
        lines = [
            *upper.plot(profile.log_snr, profile.inputs, label="input", linewidth=4, alpha=0.5),
            *upper.plot(profile.log_snr, profile.residuals, "o-", markersize=3, label="target"),
        ]
        both = [*profile.inputs.tolist(), *profile.residuals.tolist()]
        upper.set(yscale="log", ylim=(min(0.2, *both) / 1.3, max(5.0, *both) * 1.3))
        upper.set_title("Deviation of what the network is given and has to predict")
        label_right(upper, lines, gap=0.14)
        lower.plot(profile.measured, profile.gradients, "o-", markersize=3, color=ink(2))
        lower.set(yscale="log", xlabel="log-SNR   (noise left, clean images right)")
        lower.set_title("Gradient norm of each level's weighted loss, all parameters")
        for axes in (upper, lower):
            plain_logarithmic(axes)
    return figure
