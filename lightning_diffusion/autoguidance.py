"""A bad version of the model guides it (Karras et al. 2024, NeurIPS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_diffusion.averaging import full_name
from lightning_diffusion.drawing import Drawing, evaluating
from lightning_diffusion.exported import load_module
from lightning_diffusion.guidance import Extrapolation, Guidance
from lightning_diffusion.noise_level import NoiseLevel, per_sample
from lightning_diffusion.objective import Condition
from lightning_diffusion.processes import Schedule, StraightPath, VarianceExploding, VariancePreserving
from lightning_diffusion.sampling import Denoiser

_ALIKE = 0.02  # what Standardize measures of the same data differs by less from one run to another


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """x_0 = g + scale (c - g), g a smaller or shorter trained model, same condition (Karras et al. 2024, eq. 3).

    The guide makes the same mistakes, only larger: moving away from it corrects them, without a null label and without
    the loss of variety that ClassifierFree brings. A guide without classes gives classifier-free guidance between two
    networks, as EDM2 does it. The guide may have been trained on another process or objective.

    Args:
        guide: run folder, checkpoint or exported .safetensors; in Python also a DiffusionModule.
        scale: above 1; 1 is off.
        interval: levels sigma/alpha in (low, high] are guided; None for all.
        rescale: as in ClassifierFree.
        weights: the guide's: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages. The paper
            has the guide's average shorter, the model's longer.

    Raises:
        ValueError: unless 0 <= low < high and 0 <= rescale <= 1; when it is used, for a guide of other images, other
            classes or in another representation.
    """

    guide: str | Drawing = field(repr=False)
    scale: float = 2.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    weights: str | None = None

    def __post_init__(self) -> None:
        self._extrapolation.checked()

    def __call__(self, conditional: Denoiser, unconditional: Denoiser) -> Denoiser:
        return self._extrapolation(conditional, unconditional)

    def guide_for(self, model: Drawing, condition: Condition) -> Denoiser:
        """The guide's denoiser at the levels of the model's process."""
        guide = self.model.to(next(model.parameters()).device)
        _check_alike(model, guide)
        denoise = guide.denoiser(condition, weights=self.weights_in_use)
        same = _process(guide.objective.schedule) is _process(model.objective.schedule)
        return partial(_evaluated if same else _carried, guide, denoise)

    @cached_property
    def model(self) -> Drawing:
        """The guide itself, read when it is first needed."""
        return load_module(self.guide) if isinstance(self.guide, str) else self.guide

    @property
    def weights_in_use(self) -> str:
        """The guide's, by the name that says which."""
        weights = self.weights or ("ema" if self.model.averages else "online")
        return full_name(weights, self.model.averages)

    @property
    def tag(self) -> str:
        return f"autoguidance{self._extrapolation.tag}"

    @property
    def _extrapolation(self) -> Extrapolation:
        return Extrapolation(self.scale, self.interval, self.rescale)


def _evaluated(guide: Drawing, denoise: Denoiser, x_t: Tensor, level: NoiseLevel) -> Tensor:
    with evaluating(guide.network):
        return denoise(x_t, level)


def _carried(guide: Drawing, denoise: Denoiser, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """At the same log-SNR of the guide's process; finite at alpha = 0, if the guide's process reaches it."""
    own = guide.objective.schedule.at(level.log_snr)
    if not bool(own.sigma.isfinite().all()):
        raise ValueError(
            f"The model starts from pure noise, which the guide's {type(guide.objective.schedule).__name__} never "
            "reaches. Give an interval without it, such as interval=(0.0, 50.0), or a guide of the model's process."
        )
    return _evaluated(guide, denoise, per_sample(own.sigma / level.sigma, x_t) * x_t, own)


def _process(schedule: Schedule) -> type[Schedule]:
    kinds: Sequence[type[Schedule]] = (VariancePreserving, StraightPath, VarianceExploding)
    return next((kind for kind in kinds if isinstance(schedule, kind)), type(schedule))


def _check_alike(model: Drawing, guide: Drawing) -> None:
    found = {"images of": (guide.image_shape, model.image_shape), "classes": _classes(guide, model)}
    for what, (theirs, own) in found.items():
        if theirs != own:
            raise ValueError(
                f"The guide has {what} {theirs}, the model {own}: expected the same. Guide with a smaller or shorter "
                "trained model of the same data."
            )
    if not _same_space(model, guide):
        raise ValueError(
            f"The guide's representation {type(guide.representation).__name__} is not the model's "
            f"{type(model.representation).__name__} or has other numbers, so that they denoise in different spaces: "
            "guide with a model that was trained in the same representation of the same data."
        )


def _classes(guide: Drawing, model: Drawing) -> tuple[int, int]:
    return guide.num_classes, model.num_classes if guide.num_classes else 0


def _same_space(model: Drawing, guide: Drawing) -> bool:
    own, theirs = model.representation.state_dict(), guide.representation.state_dict()
    return type(model.representation) is type(guide.representation) and all(
        name in own and torch.allclose(own[name], theirs[name].to(own[name]), rtol=_ALIKE, atol=_ALIKE)
        for name in theirs
    )
