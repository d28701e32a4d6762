"""Models for other programs: diffusers' folders, and programs that run with torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffusion.batches import CONTEXT, LABEL, declared_conditions
from lightning_diffusion.diffusers_models import DiffusersUNet, dit_to_diffusers, unet_to_diffusers
from lightning_diffusion.diffusers_schedulers import scheduler_for
from lightning_diffusion.exported import KEY, default_weights, network_with
from lightning_diffusion.io import filled_folder, publish, temporary_beside
from lightning_diffusion.module import DiffusionModule
from lightning_diffusion.networks import DiT
from lightning_diffusion.noise_level import NoiseLevel
from lightning_diffusion.recording import spec
from lightning_diffusion.representation import Identity, Representation
from lightning_diffusion.sampling import Sampler

_TOKENS = 2


def export_diffusers(
    module: DiffusionModule, folder: str | Path, weights: str | None = None, sampler: Sampler | None = None
) -> None:
    """A folder that plain diffusers opens: `unet` or `transformer`, and `scheduler`, each by its `from_pretrained`.

    From the same noise both draw the same images, within float32. Only the representation stays behind, what it is goes
    into lightning_diffusion.json; but for Identity, diffusers does not hold guesses within the range of images.

    Args:
        module: with a network that diffusers has: `DiffusersUNet`, or `DiT` with the options of diffusers'.
        folder: where to.
        weights: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages.
        sampler: Euler, DDIM or DPMSolver2M; None: the module's.

    Raises:
        ValueError: for a network, an objective or a sampler that diffusers does not have.
    """
    sampler, clipped = sampler or module.sampler, is_clipped(module.representation)
    scheduler = scheduler_for(module.objective, sampler, clipped)
    name, model = _diffusers_model(network_with(module, weights))
    start = module.objective.schedule.sampling_levels(2).sigma[0].item()
    said = {**_said(module, weights, sampler), "noise_scale": start}
    said["representation"] = _described(module.representation)
    with filled_folder(Path(folder)) as unfinished:
        model.save_pretrained(unfinished / name)
        scheduler.save_pretrained(unfinished / "scheduler")
        (unfinished / f"{KEY}.json").write_text(json.dumps(said, indent=1))


def export_program(module: DiffusionModule, path: str | Path, weights: str | None = None) -> None:
    """A program of the denoiser, for `torch.export.load(path).module()` where there is torch and nothing else.

        x_0_hat = denoiser(x_t, alpha, sigma, label)        x_t (B, C, H, W), alpha and sigma (B,)

    Any B; of DiffusersUNet at most 63.

    Preconditioning is inside; label int64 (B,), the null label is the number of classes, and context (B, T, D) are
    arguments where the network has them. Levels of the sampler's steps are in the file, under the extra file
    lightning_diffusion.json. What decodes the drawn is a program of its own, NAME-decode.pt2, unless nothing does.

    Args:
        module: a DiffusionModule.
        path: NAME.pt2.
        weights: online, ema, ema:NAME or FILE.safetensors; None: ema where there are averages.

    Raises:
        ValueError: for a network that does not say what shape it draws.
    """
    path, denoiser = Path(path), ExportedDenoiser(module, network_with(module, weights))
    level = module.objective.schedule.sampling_levels(module.sampler.num_steps)
    levels = {"alpha": level.alpha.tolist(), "sigma": level.sigma.tolist()}
    said = {**_said(module, weights, module.sampler), "levels": levels}
    given = example(module)
    _save(path, denoiser, given, said)
    if not isinstance(module.representation, Identity):
        _save(path.with_name(f"{path.stem}-decode{path.suffix}"), Decoder(module), (given[0],), {})


class ExportedDenoiser(nn.Module):
    """x_0_hat = denoiser(x_t, alpha, sigma, *condition), conditions in the order of `conditions_of`."""

    def __init__(self, module: DiffusionModule, network: nn.Module) -> None:
        super().__init__()
        self.network, self.objective = network, module.objective
        self.representation, self.conditions = module.representation, conditions_of(module)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        given = dict(zip(self.conditions, condition, strict=True))
        guess = self.objective.denoise(self.network, x_t, NoiseLevel(alpha, sigma), given)
        return self.representation.hold(guess)


class Decoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] of what was drawn."""

    def __init__(self, module: DiffusionModule) -> None:
        super().__init__()
        self.representation = module.representation

    def forward(self, x: Tensor) -> Tensor:
        images = self.representation.decode(x)
        return images.clamp(-1, 1) if self.representation.bounded else images


def conditions_of(module: DiffusionModule) -> list[str]:
    """The conditions that a program takes: label where there are classes, context where the network attends to one."""
    has = {LABEL: module.num_classes, CONTEXT: getattr(module.network, "context_dim", 0)}
    return [name for name in (LABEL, CONTEXT) if has[name] and name in declared_conditions(module.network)]


def example(module: DiffusionModule) -> tuple[Tensor, ...]:
    """Arguments of the denoiser for two images."""
    if module.image_shape is None:
        raise ValueError(
            f"{type(module.network).__name__} does not say what shape it draws: give it image_shape = (C, H, W)."
        )
    x = torch.zeros(2, *module.image_shape)
    level = module.objective.schedule(torch.full((2,), 0.5)).to(x)
    made = {
        LABEL: torch.zeros(2, dtype=torch.long),
        CONTEXT: torch.zeros(2, _TOKENS, getattr(module.network, "context_dim", 0)),
    }
    return (x, *level, *(made[name] for name in conditions_of(module)))


def is_clipped(representation: Representation) -> bool:
    """Whether guesses of clean data are held within [-1, 1] as they are."""
    return isinstance(representation, Identity) and representation.bounded


def _save(path: Path, program: nn.Module, given: tuple[Tensor, ...], said: dict[str, Any]) -> None:
    batch = torch.export.Dim("batch", max=_most_at_once(program))
    tokens = torch.export.Dim("tokens")
    shapes = [{0: batch} | ({1: tokens} if x.ndim == 3 else {}) for x in given]
    dynamic = (*shapes[:3], tuple(shapes[3:])) if isinstance(program, ExportedDenoiser) else tuple(shapes)
    with torch.no_grad():
        exported = torch.export.export(program.eval(), given, dynamic_shapes=dynamic, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(exported, file, extra_files={f"{KEY}.json": json.dumps(said)})
        publish(temporary, path)


def _most_at_once(program: nn.Module) -> int | None:
    """UNet2DModel takes another way from 64 images on, of which a program has only one."""
    return 63 if any(isinstance(part, DiffusersUNet) for part in program.modules()) else None


def _diffusers_model(network: nn.Module) -> tuple[str, Any]:
    if isinstance(network, DiffusersUNet):
        return "unet", unet_to_diffusers(network)
    if isinstance(network, DiT):
        return "transformer", dit_to_diffusers(network)
    raise ValueError(
        f"diffusers has no {type(network).__name__}: expected DiffusersUNet, or DiT with the options of diffusers'. "
        "Export to safetensors or torch-export, which take any network."
    )


def _said(module: DiffusionModule, weights: str | None, sampler: Sampler) -> dict[str, Any]:
    return {
        "weights": weights or default_weights(module),
        "image_shape": module.image_shape,
        "num_classes": module.num_classes,
        "sampler": spec(sampler),
    }


def _described(representation: Representation) -> dict[str, Any]:
    numbers = {name: x.tolist() for name, x in representation.state_dict().items() if x.numel() <= 64}
    return {**(spec(representation) or {"class_path": type(representation).__name__}), "numbers": numbers}
