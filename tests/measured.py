"""What tests of metrics share: digits as real images, a quick extractor, and modules whose samples are known."""

import torch
from torch import nn

import lightning_diffusion as ld
from lightning_diffusion.datamodules import DigitsDataModule
from lightning_diffusion.generative import RealFeatures, get_ready, real_features
from lightning_diffusion.real_images import RealImages

PIXELS = ld.ModuleFeatures(nn.Flatten(), "pixels", channels=1, mean=[0.0], std=[1.0])


def digits(batch_size=64, **options):
    """The digits as real images."""
    data = DigitsDataModule(batch_size, **options)
    return RealImages(data.train_dataloader(), [data.val_dataloader()])


def compared(real=None):
    """Pixels as features, and those of real images."""
    real = real or digits()
    ready = get_ready(PIXELS, real)
    return ready, RealFeatures(*real_features(ready, real))


class Drawing(nn.Module):
    """Draws from images (N, C, H, W) in [-1, 1] that it has, by the seed, and notes what it was asked."""

    def __init__(self, images, num_classes=0):
        super().__init__()
        self.images, self.num_classes, self.calls = images, num_classes, []

    def sample(self, num_samples, condition=None, *, weights, seed, **others):
        self.calls.append({"num": num_samples, "condition": condition, "weights": weights, **others})
        chosen = torch.randint(
            len(self.images), (num_samples,), generator=torch.Generator().manual_seed(seed)
        )
        return self.images[chosen]


def images_of(part):
    """The images of a part of the digits in [-1, 1], (N, 1, 8, 8)."""
    return torch.cat([batch.images for batch in part]).float() / 127.5 - 1
