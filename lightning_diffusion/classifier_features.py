"""Features without a download: a small classifier that is trained on the labelled data themselves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, pad

from lightning_diffusion.feature_cache import cached, content_hash
from lightning_diffusion.features import FeatureExtractor
from lightning_diffusion.real_images import RealImages
from lightning_diffusion.waiting import Waiting

_VERSION = 1  # of network and training: another one makes other features
_LARGEST = 32
_BATCH = 128


@dataclass(frozen=True)
class ClassifierFeatures(FeatureExtractor):
    """A convolutional classifier, trained on the training part on the CPU in some seconds; its last hidden layer.

    Deterministic, and kept in the cache. Images above 32 x 32 are averaged down to it. It sees what tells classes
    apart and little else: for small data such as the digits, where an Inception network is out of its element.

    Args:
        num_features: F, well below the number of samples.
        steps: of training, with batches of 128.
        seed: of parameters and batches.
    """

    num_features: int = 64
    steps: int = 300
    seed: int = 0

    @property
    def name(self) -> str:
        return "classifier"

    def load(self, real: RealImages) -> nn.Module:
        labels = real.content.labels
        classes = 0 if labels is None else int(labels.max()) + 1
        if labels is None or classes < 2:
            raise ValueError(
                f"ClassifierFeatures learn from labels, and the data have {'one class' if classes else 'none'}. Use "
                "InceptionFeatures, or ModuleFeatures with a network of your own."
            )
        images = torch.cat([_shrunk(batch.images) for batch in real.training()])
        with torch.random.fork_rng(devices=[]):
            network = _Classifier(images.shape[1], self.num_features, classes)
        content = content_hash(_VERSION, self, real.content.digest)
        compute = lambda: _trained(network, images, labels, self.steps, self.seed, real.shown)  # noqa: E731
        network.load_state_dict(cached("classifier", content, compute))
        return network.eval().requires_grad_(False)


class _Classifier(nn.Module):
    """uint8 images (N, C, H, W) to features (N, F); `logits` to classes."""

    def __init__(self, channels: int, num_features: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        convolutions = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=1 + (b > 32), padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in pairwise(widths)
        ]
        self.body = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Linear(4 * widths[-1], num_features)
        self.head = nn.Linear(num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(self.body(_shrunk(images) / 127.5 - 1))
        return features

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(nn.functional.silu(self(images)))
        return logits


def _shrunk(images: Tensor) -> Tensor:
    """Float in 0..255, at most 32 x 32."""
    height, width = (min(size, _LARGEST) for size in images.shape[-2:])
    return (
        images.float()
        if images.shape[-2:] == (height, width)
        else adaptive_avg_pool2d(images.float(), (height, width))
    )


def _trained(
    network: _Classifier, images: Tensor, labels: Tensor, steps: int, seed: int, shown: bool
) -> dict[str, Tensor]:
    """Parameters after training with shifts by a pixel and smoothed labels; no random numbers of others are used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        network.apply(_reset)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with Waiting(steps, "steps of the classifier", shown=shown) as waiting:
            for _ in range(steps):
                chosen = torch.randint(len(images), (_BATCH,), generator=generator)
                logits = network.logits(_shifted(images[chosen], generator))
                optimizer.zero_grad()
                cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                rate.step()
                waiting.advance(1)
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _reset(part: nn.Module) -> None:
    if callable(reset := getattr(part, "reset_parameters", None)):
        reset()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """All images moved by the same -1, 0 or 1 pixels each way, edges repeated."""
    y, x = torch.randint(3, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    return pad(images, (1, 1, 1, 1), mode="replicate")[..., y : y + height, x : x + width]
