"""How good the images are that a module draws, in the features of an extractor.

Samples are drawn in chunks, each with a seed and labels of its own, so that they do not depend on how many processes
share the work. Labels are in the proportions of the training data. Images reach the extractor rounded to 8 bits.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_diffusion.batches import LABEL
from lightning_diffusion.feature_cache import cached, content_hash
from lightning_diffusion.features import FeatureExtractor, extract
from lightning_diffusion.guidance import Guidance
from lightning_diffusion.io import tensors_hash
from lightning_diffusion.metrics import frechet_distance, kernel_distance, near_copies, precision_recall
from lightning_diffusion.real_images import Batch, RealImages, to_8_bits
from lightning_diffusion.resume import hash_seed
from lightning_diffusion.sampling import Sampler
from lightning_diffusion.sharing import Share
from lightning_diffusion.waiting import Waiting

PAIRWISE = 10_000
"""Of more samples, a fixed random choice goes into figures that compare every sample with every other."""

FIGURES = ("frechet", "kernel", "precision", "recall", "near_copies", "near_copies_held_out")
_CHUNK = 256
_FARTHEST = 2.0  # from 0; a decoder may overshoot [-1, 1] a little, which pictures clip too


class RealFeatures(NamedTuple):
    """Features of real images, float32: training (N, F) and held out (M, F), M = 0 where there are none."""

    training: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Draws:
    """What is drawn.

    Args:
        num_samples: how many.
        weights: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages, else online.
        sampler: instead of the module's own.
        guidance: combines the denoisers with and without the condition.
        seed: of noise and labels.
    """

    num_samples: int
    weights: str | None = None
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    seed: int = 0


@dataclass(frozen=True)
class ReadyExtractor:
    """An extractor with its network, for images of one shape (C, H, W)."""

    extractor: FeatureExtractor
    network: nn.Module
    image_shape: tuple[int, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, F) on the CPU of uint8 images (N, C, H, W)."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"found drawn images of shape {tuple(images.shape[1:])} and real ones of {self.image_shape}: compare "
                "with data of the size that the model was trained on."
            )
        return extract(self.network, images, self.extractor)


def get_ready(
    extractor: FeatureExtractor, real: RealImages, device: torch.device | str = "cpu"
) -> ReadyExtractor:
    """The extractor with its network on `device`, after a try on a few real images.

    Raises:
        OSError, ValueError: if it cannot be had, or does not take these images.
    """
    few = next(real.training()).images[:2]
    ready = ReadyExtractor(extractor, extractor.load(real).to(device), tuple(few.shape[1:]))
    ready(few)
    return ready


def real_images_of(module: Any, training: Any, held_out: Any, shown: bool = True) -> RealImages:
    """The images that a module is trained on: of its loaders, decoded where they hold latents.

    Args:
        module: any; what is `representation.encoded` is decoded by it.
        training: the loader of the training data.
        held_out: a loader, or several, or None.
        shown: whether to show bars.
    """
    representation = getattr(module, "representation", None)
    decode = partial(_decoded, representation) if getattr(representation, "encoded", False) else None
    several = held_out if isinstance(held_out, (list, tuple)) else [held_out]
    return RealImages(training, [one for one in several if one is not None], decode, shown)


@torch.no_grad()
def _decoded(representation: Any, latents: Tensor) -> Tensor:
    buffers = chain(representation.parameters(), representation.buffers())
    device = next((x.device for x in buffers), latents.device)
    images: Tensor = representation.decode(representation.encode(latents.to(device)))
    return images


def real_features(ready: ReadyExtractor, real: RealImages) -> RealFeatures:
    """Features of all real images, from the cache if it holds those of these very images and this very network."""

    def compute() -> dict[str, Tensor]:
        total = real.num_training + real.num_held_out
        with Waiting(total, f"{ready.extractor.name} features", shown=real.shown) as waiting:
            parts = {"training": real.training(), "held_out": real.held_out()}
            made = {name: list(_features(part, ready, waiting)) for name, part in parts.items()}
        width = made["training"][0].shape[1]
        return {name: torch.cat(rows) if rows else torch.empty(0, width) for name, rows in made.items()}

    parameters = tensors_hash(ready.network.state_dict())
    content = content_hash(repr(ready.extractor), parameters, _versions(ready.network), real.content.digest)
    return RealFeatures(**cached(ready.extractor.name, content, compute, _probe(ready)))


def _probe(ready: ReadyExtractor) -> Tensor:
    """Features (4, F) of two images of noise and two of coarse noise, which no data enter."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = ready.image_shape
    fine = torch.rand(2, channels, height, width, generator=generator)
    coarse = interpolate(torch.rand(2, channels, 4, 4, generator=generator), (height, width))
    return ready((torch.cat([fine, coarse]) * 255).round().byte())


def _versions(network: nn.Module) -> dict[str, str]:
    """Of the packages that its parts are from."""
    packages = {type(part).__module__.partition(".")[0] for part in network.modules()}
    return {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in sorted(packages)}


def _features(batches: Iterator[Batch], ready: ReadyExtractor, waiting: Waiting) -> Iterator[Tensor]:
    for batch in batches:
        yield ready(batch.images)
        waiting.advance(len(batch.images))


def few_samples(real: RealFeatures, num_samples: int) -> str | None:
    """What is wrong with the number of samples, or None."""
    width = real.training.shape[1]
    few = {"samples": num_samples, "real images": len(real.training)}
    said = " and ".join(f"{number} {what}" for what, number in few.items() if number <= width)
    return (
        f"found {said} for {width} features: a covariance is singular and the Frechet distance mostly bias. Use more "
        f"than {width}, ten times as many for good figures, an extractor with fewer features, or the kernel distance."
        if said
        else None
    )


def num_chunks(num_samples: int) -> int:
    """In how many calls of `sample` so many are drawn."""
    return math.ceil(num_samples / _CHUNK)


def drawn_features(
    module: Any,
    draws: Draws,
    ready: ReadyExtractor,
    labels: Tensor | None,
    share: Share | None = None,
    shown: bool = True,
) -> Tensor:
    """Features float32 (num_samples, F) of what `module` draws; rows of images that are none are NaN.

    Args:
        module: with the `sample` of DiffusionModule.
        draws: what is drawn.
        ready: what looks at the images.
        labels: of the training data (N,); None draws without.
        share: of this process; all of them must call this.
        shown: whether to show a bar.
    """
    share = share or Share()
    chunks = num_chunks(draws.num_samples)
    size = math.ceil(draws.num_samples / chunks)
    rounds = range(share.rank, math.ceil(chunks / share.world_size) * share.world_size, share.world_size)
    rows = []
    with Waiting(draws.num_samples, "samples", shown=shown and share.rank == 0) as waiting:
        for number in rounds:
            rows.append(_drawn(module, draws, number, size, ready, labels))
            waiting.advance(size * share.world_size)
    everything = share.gather(torch.stack(rows)).cpu()  # (world_size, chunks, size, F)
    return everything.transpose(0, 1).flatten(0, 2)[: draws.num_samples]


def _drawn(
    module: Any,
    draws: Draws,
    number: int,
    size: int,
    ready: ReadyExtractor,
    labels: Tensor | None,
) -> Tensor:
    seed = hash_seed(draws.seed, "metrics", number)
    condition = None if labels is None else {LABEL: _chosen(labels, size, seed)}
    given = {"sampler": draws.sampler, "guidance": draws.guidance}
    images = module.sample(
        size,
        condition,
        weights=draws.weights or default_weights(module),
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    is_image = (images.isfinite() & (images.abs() <= _FARTHEST)).flatten(1).all(1)
    safe = torch.where(is_image[:, None, None, None], images, 0).clamp(-1, 1)
    features = ready(to_8_bits(safe))
    return torch.where(is_image[:, None].cpu(), features, torch.nan)


def default_weights(module: Any) -> str:
    """`ema` where there are averages, else `online`."""
    return "ema" if getattr(module, "averages", None) else "online"


def _chosen(labels: Tensor, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash_seed(seed, "labels"))
    return labels[torch.randint(len(labels), (size,), generator=generator)]


def diverged(features: Tensor) -> str | None:
    """What is wrong with samples whose features (N, F) these are, or None."""
    bad = int(features.isnan().any(1).sum())
    return (
        f"{bad} of {len(features)} samples hold NaN, infinity or values beyond {_FARTHEST:g}, expected images in "
        "[-1, 1]: the model has diverged, or does not draw images, so every figure is nan."
        if bad
        else None
    )


def figures(real: RealFeatures, drawn: Tensor) -> dict[str, float]:
    """All figures by name: nan if the model has diverged, and without `near_copies_held_out` if nothing is held out.

    Near-copies are the share of samples closer to a training image than 95 % of the training images are to their
    nearest other one; of held-out images the same share shows what no copying looks like.
    """
    names = [name for name in FIGURES if name != "near_copies_held_out" or len(real.held_out) > 1]
    if drawn.isnan().any():
        return dict.fromkeys(names, math.nan)
    training, held_out, samples = (_some(x) for x in (real.training, real.held_out, drawn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples are warned of once, beforehand
        frechet = frechet_distance(real.training, drawn)
    quality = precision_recall(training, samples)
    copies = {"near_copies": samples, "near_copies_held_out": held_out}
    found = {"frechet": frechet, "kernel": kernel_distance(training, samples), **quality._asdict()}
    found |= {name: near_copies(x, training) for name, x in copies.items() if name in names}
    return {name: float(found[name]) for name in names}


def logged_names(found: Mapping[str, float], extractor: FeatureExtractor, draws: Draws) -> dict[str, float]:
    """Figures under names that say with which extractor and how many samples: metrics/frechet_classifier_2000.

    Weights and guidance follow where they were asked for: metrics/frechet_classifier_2000_online_guidance1.5.
    """
    tail = f"{extractor.name}_{draws.num_samples}{_asked(draws)}"
    return {f"metrics/{name}_{tail}": value for name, value in found.items()}


def _asked(draws: Draws) -> str:
    weights = "" if draws.weights is None else f"_{draws.weights.replace(':', '_').rpartition('/')[2]}"
    return weights if draws.guidance is None else f"{weights}_{draws.guidance.tag}"


def _some(x: Tensor) -> Tensor:
    if len(x) <= PAIRWISE:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:PAIRWISE]]
