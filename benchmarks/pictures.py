"""The pictures of docs/objective.md: what schedules, densities, weightings, targets and recipes do over log-SNR.

python benchmarks/pictures.py docs/images [--only information densities]
"""

from __future__ import annotations

import argparse
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from recipes import RECIPES, objective_of
from torch import Tensor

import lightning_diffusion as ld
from lightning_diffusion.analysis.information import GaussianMixture, information_curves
from lightning_diffusion.plots import PALETTE, QUIET, label_right, style

WIDTH = 8.0  # inches
AXIS = "log-SNR  (noise on the left, data on the right)"
LOG_SNR = torch.linspace(-10, 10, 1001, dtype=torch.float64)
SPREAD = math.sqrt(1 + 0.3**2)
MIXTURE = GaussianMixture([0.5, 0.5], [[-1 / SPREAD], [1 / SPREAD]], [0.3 / SPREAD] * 2)  # of deviation 1
NORMAL = GaussianMixture([1.0], [[0.0]], [1.0])
LABELS = {"edm2": "edm2, weight learned on two Gaussians"}
TARGETS = (ld.X0(), ld.Epsilon(), ld.V(), ld.Score(), ld.Flow())


def figure(rows: int, columns: int, height: float, **shared: bool | str) -> tuple[Figure, np.ndarray]:
    """Axes of shape (rows, columns) on a page's width."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    drawn.get_layout_engine().set(hspace=0.04, wspace=0.04)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **shared)


def information() -> Figure:
    """What x_t tells of x_0, of the noise and of v: noise on the left, as on every axis of log-SNR."""
    drawn, axes = figure(2, 2, 5.6, sharex="col", sharey=True)
    t = torch.linspace(0.998, 0.002, 160, dtype=torch.float64)
    coordinates = [(t, ld.ContinuousCosineSchedule().log_snr(t)), (LOG_SNR[::10], LOG_SNR[::10])]
    names = "two Gaussians in one dimension, deviation 1", "data N(0, 1): x_t tells nothing of v"
    for row, data, name in zip(axes, (MIXTURE, NORMAL), names, strict=True):
        for panel, (x, log_snr) in zip(row, coordinates, strict=True):
            inform(panel, x, data, log_snr)
        row[0].set(title=name, ylabel="nats that x_t tells")
    axes[1, 0].set(xlabel="t on the cosine schedule  (1 = noise, 0 = data)", xlim=(1, 0))
    axes[1, 1].set(xlabel=AXIS, xlim=(-10, 10), ylim=(-0.08, 4))
    for panel in axes[:, 1]:
        label_right(panel, panel.lines)
    return drawn


def inform(panel: Axes, x: Tensor, data: GaussianMixture, log_snr: Tensor) -> None:
    curves = information_curves(data, log_snr)[1:]
    for curve, name, colour in zip(curves, ("of x0", "of epsilon", "of v"), PALETTE, strict=False):
        panel.plot(x, curve.value, color=colour, label=name, clip_on=name != "of v")


def schedules() -> Figure:
    """Log-SNR over time."""
    drawn, (axes,) = figure(1, 2, 4.4, sharex=True, sharey=True)
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tables = {
        "linear": ld.LinearSchedule, "scaled linear": ld.ScaledLinearSchedule, "exponential": ld.ExponentialSchedule,
        "sigmoid": ld.SigmoidSchedule, "cosine (squaredcos_cap_v2)": ld.CosineSchedule,
    }  # fmt: skip
    for (name, table), colour in zip(tables.items(), PALETTE, strict=False):
        axes[0].plot(t, table().log_snr(t), color=colour, label=name)
        axes[0].plot(t, table(zero_terminal_snr=True).log_snr(t), ":", color=colour)
    axes[0].plot([], [], ":", color="0.3", label="the same, zero terminal SNR")
    continuous = {
        "cosine": ld.ContinuousCosineSchedule(), "flow": ld.FlowSchedule(), "flow, shift 3": ld.FlowSchedule(3.0),
        "EDM, rho = 7": ld.EDMSchedule(), "EDM, rho = 1": ld.EDMSchedule(rho=1.0), "geometric": ld.GeometricSchedule(),
    }  # fmt: skip
    for (name, schedule), colour in zip(continuous.items(), PALETTE, strict=False):
        axes[1].plot(t, schedule.log_snr(t), color=colour, label=name)
    for panel, name in zip(axes, ("tables of 1000 steps", "continuous"), strict=True):
        panel.set(xlabel="t  (0 = data, 1 = noise)", ylim=(-24, 14), xlim=(0, 1), title=name)
        panel.legend(loc="lower left", borderaxespad=0.2)
    axes[0].set_ylabel("log-SNR")
    return drawn


def densities() -> Figure:
    """Histograms of draws beside exact densities."""
    drawn, axes = figure(2, 3, 4.8, sharex=True)
    flow, cosine = ld.FlowSchedule(), ld.ContinuousCosineSchedule()
    members = {
        "UniformSigma(0.002, 80)": ld.UniformSigma(),
        "LogUniformSigma(0.002, 80)": ld.LogUniformSigma(),
        "LogNormalSigma(-1.2, 1.2)": ld.LogNormalSigma(),
        "the same, Truncated(-4, 6)": ld.Truncated(ld.LogNormalSigma(), -4.0, 6.0),
        "LogitNormalTime on a flow": ld.LogitNormalTime(schedule=flow),
        "UniformTime on a cosine": ld.UniformTime(cosine),
    }
    for panel, (name, density) in zip(axes.flat, members.items(), strict=True):
        histogram(panel, density)
        panel.set(title=name, xscale="log", xlim=(1e-3, 2e2), ylim=(0, None))
        panel.set_xticks([1e-2, 1, 1e2])
    axes[0, 0].legend(loc="upper left")
    drawn.supxlabel("sigma / alpha", fontsize=10)
    drawn.supylabel("density per unit of ln(sigma / alpha)", fontsize=10)
    return drawn


def histogram(panel: Axes, density: ld.Density) -> None:
    edges = 0.002 * np.exp(np.arange(-4, 66) * math.log(40_000) / 60)  # 0.002 and 80 among them
    sigma = (draws(density) / -2).exp()
    counts = np.histogram(sigma, edges)[0] / len(sigma) / np.diff(np.log(edges))
    panel.stairs(counts, edges, fill=True, color=PALETTE[5], alpha=0.6, label="500,000 draws")
    fine = torch.logspace(-3, 2.3, 8000, dtype=torch.float64)
    exact = 2 * density.log_prob(-2 * fine.log(), ld.EDMSchedule()).exp()
    panel.plot(fine, exact, color=PALETTE[1], linewidth=1.4, label="exact")


def draws(density: ld.Density, batches: int = 1000, batch: int = 500) -> Tensor:
    """Log-SNRs as training draws them, stratified within each batch."""
    keys = (ld.RandomKey(0, batch=number) for number in range(batches))
    return torch.cat([density.draw(batch, ld.EDMSchedule(), key) for key in keys])


@dataclass(frozen=True)
class OnePerUnit(ld.Density):
    """Improper: one sample per unit of log-SNR, so that effective weights are weights on the residual."""

    def quantile(self, u: Tensor, schedule: ld.Schedule) -> Tensor:
        return 14 - 28 * u

    def log_prob(self, log_snr: Tensor, schedule: ld.Schedule) -> Tensor:
        return torch.zeros_like(log_snr)


def on_residual(weighting: ld.Weighting, target: ld.Target) -> Tensor:
    """The weight on the residual at LOG_SNR, for data of deviation 1 and a variance-preserving process."""
    preconditioning = ld.DDPMPreconditioning(target)
    objective = ld.DiffusionObjective(ld.LinearSchedule(), OnePerUnit(), preconditioning, weighting)
    return learned(objective).effective_weight(LOG_SNR)


def learned(objective: ld.DiffusionObjective) -> ld.DiffusionObjective:
    """With a learned weight as it ends beside the exact denoiser of the mixture."""
    if not isinstance(objective.weighting, ld.Uncertainty):
        return objective
    share = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    log_snr = objective.density.quantile(share, objective.schedule)
    of_deviation_1 = log_snr + 2 * math.log(objective.sigma_data)
    loss = MIXTURE.mmse(ld.LinearSchedule().at(of_deviation_1)) * (of_deviation_1.exp() + 1)
    c_noise = objective.preconditioning.c_noise(objective.schedule.at(log_snr))
    optimizer = torch.optim.Adam(objective.weighting.parameters(), 0.02)
    for _ in range(1000):
        objective.weighting.combine(loss.float(), c_noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective


def weightings() -> Figure:
    """All weightings on the residual, a family in each panel, the others grey."""
    by_target = {f"1 on {type(target).__name__}": (ld.Constant(), target) for target in TARGETS}
    families: dict[str, dict[str, tuple[ld.Weighting, ld.Target]]] = {
        "Constant on each target (EDM: as on V)": by_target,
        "powers and bounds of SNR": named(
            ld.SNRPower(0.5), ld.MinSNR(), ld.MaxSNR(), ld.SNRClip(), ld.LogSNR()
        ),
        "soft bounds": named(ld.P2(0.5), ld.P2(), ld.SoftMinSNR(), ld.Debiased()),
        "per unit of log-SNR, and learned": named(
            ld.Sigmoid(-3.0), ld.Sigmoid(), ld.Sigmoid(2.0), ld.Uncertainty()
        ),
    }
    curves = {
        title: {name: on_residual(*of) for name, of in members.items()} for title, members in families.items()
    }
    drawn, axes = figure(2, 2, 7.2, sharex=True, sharey=True)
    axes[0, 0].set(yscale="log", ylim=(1e-4, 20), xlim=(-10, 10))
    for panel, (title, own) in zip(axes.flat, curves.items(), strict=True):
        others = [curve for name, family in curves.items() if name != title for curve in family.values()]
        among(panel, own, others)
        panel.legend(
            title=title, alignment="left", loc="lower left", bbox_to_anchor=(-0.03, 1),
            ncols=2, handlelength=1.1, handletextpad=0.4, columnspacing=0.8,
        )  # fmt: skip
    drawn.supxlabel(AXIS, fontsize=10)
    drawn.supylabel("weight on the residual of unit variance", fontsize=10)
    return drawn


def named(*members: ld.Weighting) -> dict[str, tuple[ld.Weighting, ld.Target]]:
    """Weightings that carry their own space, by what would be written to make them."""
    return {re.sub(r"\w+=|\.0\b", "", repr(w)): (w, ld.Epsilon()) for w in members}


def among(panel: Axes, own: dict[str, Tensor], others: Sequence[Tensor]) -> None:
    """A family's curves in colour over all others in grey; those that coincide share a line."""
    for curve in others:
        panel.plot(LOG_SNR, curve, color=QUIET, linewidth=0.8, label="_others")
    shared: dict[str, Tensor] = {}
    for name, curve in own.items():
        twin = next((n for n, c in shared.items() if torch.allclose(c, curve, rtol=1e-6)), None)
        shared[f"{twin} = {name}" if twin else name] = shared.pop(twin) if twin else curve
    for (name, curve), colour in zip(shared.items(), PALETTE, strict=False):
        panel.plot(LOG_SNR, curve, color=colour, label=name)


def effective_weight() -> Figure:
    """Every recipe's, for data of deviation 1."""
    curves = {name: effective_weight_of(objective_of(name)) for name in RECIPES}
    families = {
        "predicting the noise": "ddpm improved_ddpm latent_diffusion p2 min_snr_epsilon",
        "predicting v or the velocity": "v_zero_terminal_snr progressive_distillation rectified_flow min_snr_v "
        "vdm_plus_plus",
        "preconditioned to unit variance": "edm edm_stable_target edm2 score_matching",
    }
    drawn, axes = figure(3, 1, 7.6, sharex=True, sharey=True)
    axes[0, 0].set(xlim=(-10, 10), ylim=(0, 0.34), xticks=range(-10, 11, 2))
    for panel, (title, members) in zip(axes.flat, families.items(), strict=True):
        own = {LABELS.get(name, name): curves[name] for name in members.split()}
        among(panel, own, [curve for name, curve in curves.items() if name not in members.split()])
        panel.set_title(title)
        panel.legend(loc="upper left")
    drawn.supxlabel(AXIS + ", data of deviation 1", fontsize=10)
    drawn.supylabel("share of the training per unit of log-SNR", fontsize=10)
    return drawn


def effective_weight_of(objective: ld.DiffusionObjective) -> Tensor:
    """Normalised, at LOG_SNR of data of deviation 1."""
    own = LOG_SNR - 2 * math.log(objective.sigma_data)
    return learned(objective).effective_weight(own, normalize=True)


def preconditioning() -> Figure:
    """c_in, c_skip and c_out of every target."""
    drawn, axes = figure(3, 3, 7.0, sharex=True, sharey="col")
    rows = {
        "VP, sigma_data = 1": (ld.LinearSchedule(), 1.0),
        "VP, sigma_data = 0.5": (ld.LinearSchedule(), 0.5),
        "VE, sigma_data = 0.5": (ld.EDMSchedule(), 0.5),
    }
    for row, (name, (schedule, sigma_data)) in zip(axes, rows.items(), strict=True):
        coefficients(row, schedule.at(LOG_SNR), sigma_data)
        row[0].set_ylabel(name)
    for panel, name in zip(axes[0], ("c_in  (of all targets)", "c_skip", "c_out"), strict=True):
        panel.set_title(name)
    axes[0, 0].set(xlim=(-10, 10), ylim=(0, 2.1))
    axes[0, 1].set(ylim=(-4.2, 1.4))
    axes[0, 2].set(ylim=(-2.6, 2.6))
    drawn.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    drawn.supxlabel(AXIS, fontsize=10)
    return drawn


def coefficients(row: Sequence[Axes], level: ld.NoiseLevel, sigma_data: float) -> None:
    row[0].plot(LOG_SNR, ld.EDMPreconditioning(sigma_data=sigma_data)(level).c_in, color=PALETTE[6])
    for target, colour in zip(TARGETS, PALETTE, strict=False):
        found = ld.EDMPreconditioning(target, sigma_data)(level)
        row[1].plot(LOG_SNR, found.c_skip, color=colour, label=type(target).__name__)
        row[2].plot(LOG_SNR, found.c_out, color=colour)


PICTURES: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw
    for draw in (information, schedules, densities, weightings, effective_weight, preconditioning)
}


def write(drawn: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    drawn.savefig(buffer := io.BytesIO())
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PICTURES), choices=list(PICTURES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with style():
        for name in given.only:
            write(PICTURES[name](), given.folder / f"{name}.png")


if __name__ == "__main__":
    main()
