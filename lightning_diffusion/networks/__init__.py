"""The vessel of learning (knob 4)."""

from lightning_diffusion.networks.base import Network
from lightning_diffusion.networks.unet import UNet

__all__ = ["Network", "UNet"]
