"""`lightning_diffusion.datamodules`."""

if __name__ != "lightning_diffusion.datamodules":
    raise ImportError(
        "This folder is installed as lightning_diffusion.datamodules: write "
        "`import lightning_diffusion.datamodules`. In an uninstalled checkout the link "
        "lightning_diffusion/datamodules must be a symbolic link, not a text file."
    )

from lightning_diffusion.datamodules.base import ResumableDataModule
from lightning_diffusion.datamodules.digits import DigitsDataModule
from lightning_diffusion.datamodules.gaussian_mixture import GaussianMixtureDataModule
from lightning_diffusion.datamodules.image_folder import ImageFolderDataModule
from lightning_diffusion.datamodules.latent_writing import write_latents
from lightning_diffusion.datamodules.latents import LatentsDataModule
from lightning_diffusion.datamodules.streaming import StreamingDataModule, StreamingOptions

__all__ = [
    "DigitsDataModule",
    "GaussianMixtureDataModule",
    "ImageFolderDataModule",
    "LatentsDataModule",
    "ResumableDataModule",
    "StreamingDataModule",
    "StreamingOptions",
    "write_latents",
]
