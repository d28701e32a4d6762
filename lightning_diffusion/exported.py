"""A model as one .safetensors file: its tensors, and in the metadata the configuration that they belong to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn

from lightning_diffusion.averaging import overlay
from lightning_diffusion.io import checkpoint_of, load_checkpoint, publish, temporary_beside
from lightning_diffusion.module import CHECKPOINT_FORMAT, DiffusionModule
from lightning_diffusion.recording import INSTANTIATOR
from lightning_diffusion.sharded_checkpoints import consolidated

KEY = "lightning_diffusion"


def default_weights(module: DiffusionModule) -> str:
    """`ema` where there are averages, else `online`."""
    return "ema" if module.averages else "online"


def network_state(module: DiffusionModule, weights: str | None = None) -> dict[str, Tensor]:
    """The state dict of a module's network with the weights that are asked for, nothing shared with the module.

    Args:
        module: a DiffusionModule.
        weights: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages.

    Raises:
        ValueError: for weights that are not there or of another network.
    """
    values = module.network_weights(weights or default_weights(module))
    state = module.network.state_dict()
    chosen = state if values is None else overlay(state, values)
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in chosen.items()}


def network_with(module: DiffusionModule, weights: str | None = None) -> nn.Module:
    """A copy of a module's network, on the CPU, in eval mode, with weights as in `network_state`."""
    network = copy.deepcopy(module.network).cpu()
    network.load_state_dict(network_state(module, weights))
    return network.eval()


def export_safetensors(module: DiffusionModule, path: str | Path, weights: str | None = None) -> None:
    """Write a module with one choice of weights; `load_module` reads it, and `sample`, `evaluate` and `fit` do.

    Args:
        module: a DiffusionModule.
        path: NAME.safetensors.
        weights: as in `network_state`.
    """
    from safetensors.torch import save_file

    path = Path(path)
    network = {f"network.{name}": x for name, x in network_state(module, weights).items()}
    others = {name: x for name, x in module.state_dict().items() if not name.startswith("network.")}
    tensors = {**network, **{name: x.cpu().clone().contiguous() for name, x in others.items()}}
    said = {"format": CHECKPOINT_FORMAT, "weights": weights or default_weights(module)}
    recorded = json.dumps({**said, "hyper_parameters": dict(module.hparams)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: recorded, "format": "pt"})
        publish(temporary, path)


def load_module(path: str | Path, network: nn.Module | None = None) -> DiffusionModule:
    """The module of a run folder, a checkpoint (file or shards) or an exported .safetensors, on the CPU.

    Args:
        path: which.
        network: one of the same architecture, where the file cannot say how to build it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a file that is something else, or does not say how its network is built.
    """
    is_export = str(path).endswith(".safetensors")
    file = Path(path) if is_export else checkpoint_of(path)
    found = _read(file, is_export)
    recorded = found.get("hyper_parameters", {})
    if "network" not in recorded and network is None:
        raise ValueError(
            f"{file} does not say how to build its network: it is of another LightningModule, or its network is a "
            "foreign nn.Module. Load it from Python: lightning_diffusion.load_module(path, network=...).sample(...)"
        )
    given: dict[str, Any] = {} if network is None else {"network": network}
    if not is_export and file.is_file():
        return DiffusionModule.load_from_checkpoint(file, map_location="cpu", **given)
    parts = {name: made for name, made in recorded.items() if name not in INSTANTIATOR}
    module: DiffusionModule = instantiate_module(DiffusionModule, {**parts, **given})
    module.on_load_checkpoint(found)
    module.load_state_dict(found["state_dict"])
    return module


def _read(file: Path, is_export: bool) -> dict[str, Any]:
    if is_export:
        return _read_export(file)
    return consolidated(file, optimizers=False) if file.is_dir() else load_checkpoint(file)


def _read_export(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a run folder, a checkpoint or an exported file")
    with safe_open(path, "pt") as file:
        recorded = (file.metadata() or {}).get(KEY)
        if recorded is None:
            raise ValueError(
                f"{path} holds weights and no configuration: give a run folder, a checkpoint, or what `export --to "
                "safetensors` wrote. Weights alone go behind --weights."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(recorded)
    return {"state_dict": tensors, "hyper_parameters": said["hyper_parameters"], KEY: said}
