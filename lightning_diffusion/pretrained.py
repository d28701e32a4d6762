"""Networks with weights, to go on training from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning_diffusion.diffusers_models import dit_from_diffusers, import_diffusers, unet_from_diffusers
from lightning_diffusion.exported import load_module, network_with
from lightning_diffusion.networks import Network

_PARTS = ("unet", "transformer")


def load_network(path: str, weights: str | None = None) -> Network:
    """The network of a run folder, a checkpoint, an exported .safetensors, or a folder of diffusers.

        model: {network: {class_path: lightning_diffusion.load_network, init_args: {path: runs/digits-1}}}

    trains on from there; the new run's checkpoints hold the network whole, without the path.

    Args:
        path: which; of diffusers a UNet2DModel, a DiTTransformer2DModel, or a pipeline with one.
        weights: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages. diffusers has one only.

    Raises:
        FileNotFoundError, ValueError: for what is no network.
    """
    folder = _diffusers_folder(Path(path))
    if folder is None:
        loaded: Any = network_with(load_module(path), weights).train()
        return cast(Network, loaded)
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    adapters: dict[str, Callable[[Any], Network]] = {
        "UNet2DModel": unet_from_diffusers,
        "DiTTransformer2DModel": dit_from_diffusers,
    }
    if kind not in adapters:
        raise ValueError(f"{folder} holds a {kind}; expected one of {', '.join(adapters)}")
    network: Network = adapters[kind](getattr(import_diffusers(), kind).from_pretrained(folder))
    return network.train()


def _diffusers_folder(path: Path) -> Path | None:
    candidates = (path, *(path / part for part in _PARTS))
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)
