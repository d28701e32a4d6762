"""Feature extractors: what a figure of merit looks at.

    images     uint8 (N, C, H, W), C = 1 or 3
    features   float32 (N, F)

An extractor is a description; `load` makes the network. That network belongs to whoever measures, never to the model
that is trained: it is in no state_dict, no optimizer and no average. Figures of different extractors, or of different
numbers of samples, cannot be compared, so both are in every logged name.
"""

from __future__ import annotations

import pickle
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_diffusion.real_images import RealImages

_PATIENCE_SECONDS = 10.0
_LAYERS = (64, 192, 768, 2048)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(ABC):
    """Says how features are made."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short, of letters, digits and _; part of every logged name."""

    @abstractmethod
    def load(self, real: RealImages) -> nn.Module:
        """The network, from uint8 (N, C, H, W) to features (N, F), on the CPU; the same for the same data.

        Raises:
            OSError: if something it needs cannot be had.
        """


@dataclass(frozen=True)
class InceptionFeatures(FeatureExtractor):
    """The Inception network of the FID as published (Heusel et al. 2017), through torch-fidelity.

    Images of any size are enlarged or shrunk to 299 x 299, bilinearly, by torch-fidelity as TensorFlow 1 did; grey ones
    get three equal channels.

    Args:
        layer: number of features: 64, 192, 768 or 2048, the usual one.
        weights_path: the file pt_inception-2015-12-05-6726825d.pth; None downloads it (91 MB) when fit starts.
    """

    layer: int = 2048
    weights_path: str | None = None

    def __post_init__(self) -> None:
        if self.layer not in _LAYERS:
            raise ValueError(f"found layer={self.layer}, expected one of {_LAYERS}; 2048 is the usual one.")

    @property
    def name(self) -> str:
        return "inception" if self.layer == 2048 else f"inception{self.layer}"

    def load(self, real: RealImages) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if self.weights_path is not None:
            _check_weights(Path(self.weights_path))
        try:
            with _short_timeout():
                inception = FeatureExtractorInceptionV3(
                    "inception", [str(self.layer)], feature_extractor_weights_path=self.weights_path
                )
        except OSError as error:
            raise ConnectionError(
                f"the Inception weights cannot be had: {error}. {_WITHOUT_NETWORK}"
            ) from error
        return _Preprocessed(_First(inception), channels=3)


_WITHOUT_NETWORK = (
    "Without a network, use ClassifierFeatures, which is trained on the labelled data themselves, or give "
    "InceptionFeatures the weights_path of a copy of pt_inception-2015-12-05-6726825d.pth (from "
    "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0)."
)


def _check_weights(path: Path) -> None:
    """torch-fidelity would unpickle anything."""
    if not path.is_file():
        raise FileNotFoundError(f"weights_path {path} does not exist. {_WITHOUT_NETWORK}")
    try:
        torch.load(path, map_location="meta", weights_only=True)["fc.weight"]
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"weights_path {path} holds no Inception weights. {_WITHOUT_NETWORK}") from error


class ModuleFeatures(FeatureExtractor):
    """Any network, such as a DINOv2 of timm.

    Pixels are divided by 255, the image is resized to `input_size` (bicubic, antialiased) and normalised.

    Args:
        module: from float (N, channels, input_size, input_size) to (N, F); its parameters are frozen.
        name: for logged names.
        input_size: height and width that the network takes; None: images as they are.
        channels: that the network takes; grey images are repeated to 3.
        mean, std: of the network's training images, per channel; ImageNet's by default.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        input_size: int | None = None,
        channels: int = 3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"found name={name!r}, expected letters, digits and _, as in dinov2_small.")
        self.module, self._name = module, name
        self.input_size, self.channels, self.mean, self.std = input_size, channels, tuple(mean), tuple(std)

    @property
    def name(self) -> str:
        return self._name

    def __repr__(self) -> str:
        resized = (
            f"resized to {self.input_size} x {self.input_size}" if self.input_size else "images as they are"
        )
        return (
            f"ModuleFeatures({type(self.module).__name__}, {resized}, channels={self.channels}, mean={self.mean}, "
            f"std={self.std})"
        )

    def load(self, real: RealImages) -> nn.Module:
        normalised = _Normalised(self.module, self.mean[: self.channels], self.std[: self.channels])
        return _Preprocessed(normalised, self.channels, self.input_size, scaled=True)


def extract(network: nn.Module, images: Tensor, extractor: FeatureExtractor) -> Tensor:
    """Features float32 (N, F) on the CPU of uint8 images (N, C, H, W).

    Raises:
        ValueError: if the network does not take such images, or puts out another shape.
    """
    own = chain(network.parameters(), network.buffers())
    device = next((x.device for x in own), torch.device("cpu"))
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = network(images.to(device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(_misfit(extractor, images, str(error).partition("\n")[0])) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        raise ValueError(_misfit(extractor, images, f"it puts out {_shape_of(features)}, not (N, F)"))
    return features.float().cpu()


def _misfit(extractor: FeatureExtractor, images: Tensor, why: str) -> str:
    return (
        f"{extractor!r} does not take images of shape {tuple(images.shape[1:])}: {why}. Give ModuleFeatures the "
        "input_size and channels that its network was trained with; networks must put out one row per image."
    )


def _shape_of(features: Any) -> str:
    return f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__


class _Preprocessed(nn.Module):
    """Frozen, in eval mode, with channels and size that the network takes."""

    def __init__(
        self, network: nn.Module, channels: int, size: int | None = None, scaled: bool = False
    ) -> None:
        super().__init__()
        self.network, self.channels, self.size, self.scaled = network, channels, size, scaled
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1 != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        x = images.float() / 255 if self.scaled else images
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = self.network(x)
        return features


class _Normalised(nn.Module):
    """Zero mean and unit deviation per channel, before the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network((x - self.mean) / self.std)
        return features


class _First(nn.Module):
    """The first of the outputs that a network puts out as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features


@contextmanager
def _short_timeout() -> Iterator[None]:
    """Do not wait minutes for a network that does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
