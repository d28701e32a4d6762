"""The vessel of learning (knob 4)."""

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.dit import DiT, DiTOptions, DiTSize
from lightning_diffusion.networks.magnitude_preserving import MagnitudePreservingUNet
from lightning_diffusion.networks.unet import UNet

__all__ = ["DiT", "DiTOptions", "DiTSize", "MagnitudePreservingUNet", "Network", "UNet"]
