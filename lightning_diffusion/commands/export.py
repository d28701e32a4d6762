"""export: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diffusion.commands.parser import Parser, refuse_missing

if TYPE_CHECKING:
    from lightning_diffusion.module import DiffusionModule

_EXAMPLES = """\
kinds:
  checkpoint            shards in one file, with all that it takes to go on; --checkpoint and --resume take it
  safetensors           weights and configuration in one file; --checkpoint, --guide and --weights take it
  diffusers             a folder for diffusers: the model and the scheduler that draws as --sampler does here
  torch-export          a program of the denoiser for torch alone, torch.export.load(FILE).module()

examples:
  lightning-diffusion export --checkpoint runs/digits-1 --to safetensors --out digits.safetensors
  lightning-diffusion export --checkpoint runs/digits-1 --to torch-export --out digits.pt2 --weights online
  lightning-diffusion export --checkpoint runs/dit-1 --to diffusers --out dit/ --sampler dpm
  lightning-diffusion export --checkpoint runs/dit-1/checkpoints/last.ckpt --to checkpoint --out dit.ckpt"""
_ENDINGS = {"checkpoint": ".ckpt", "safetensors": ".safetensors", "torch-export": ".pt2", "diffusers": ""}


def run(command: str, arguments: list[str]) -> int:
    """Export and say what is where."""
    given = _parser().parse(arguments)
    _refuse_impossible(given)
    from lightning_diffusion.commands.quiet import quiet
    from lightning_diffusion.commands.sample import load
    from lightning_diffusion.exported import default_weights

    quiet()
    if given.to == "checkpoint":
        return _consolidate(given)
    module = load(given.checkpoint)
    _WRITERS[given.to](module, given)
    print(f"{given.out}: {given.to}, {given.weights or default_weights(module)} weights", flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser("export", "A model for other programs.", _EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint")
    add("--to", required=True, choices=list(_ENDINGS), metavar="KIND", help=", ".join(_ENDINGS))
    add(
        "--out",
        required=True,
        metavar="PATH",
        help="FILE.ckpt, FILE.safetensors, FILE.pt2, or for diffusers FOLDER/",
    )
    add(
        "--weights",
        metavar="WHICH",
        help="online, ema, ema:NAME, FILE.safetensors (ema where there are averages)",
    )
    add("--sampler", metavar="NAME[:STEPS]", help="of the scheduler or of the levels (the model's own)")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def _refuse_impossible(given: Any) -> None:
    from lightning_diffusion.commands.writing import refuse_existing

    ending = _ENDINGS[given.to]
    if ending and Path(given.out).suffix != ending:
        raise ValueError(f"--out {given.out}: expected a name that ends in {ending} for --to {given.to}")
    refuse_missing("--checkpoint", given.checkpoint)
    refuse_existing(Path(given.out), given.overwrite)


def _consolidate(given: Any) -> int:
    from functools import partial

    import torch

    from lightning_diffusion.io import load_checkpoint, write_atomically

    checkpoint = load_checkpoint(given.checkpoint)
    write_atomically(given.out, partial(torch.save, checkpoint))
    print(f"{given.out}: checkpoint, step {checkpoint['global_step']}, in one file", flush=True)
    return 0


def _safetensors(module: DiffusionModule, given: Any) -> None:
    from lightning_diffusion.exported import export_safetensors

    export_safetensors(module, given.out, given.weights)


def _diffusers(module: DiffusionModule, given: Any) -> None:
    from lightning_diffusion.commands.sample import parse_sampler
    from lightning_diffusion.exporting import export_diffusers, is_clipped

    sampler = parse_sampler(given.sampler or "", module.sampler)
    export_diffusers(module, given.out, given.weights, sampler)
    if not is_clipped(module.representation):
        name = type(module.representation).__name__
        print(f"{given.out} draws what {name} has to decode, and does not hold guesses in its range")


def _program(module: DiffusionModule, given: Any) -> None:
    from lightning_diffusion.commands.sample import parse_sampler
    from lightning_diffusion.exporting import export_program

    module.sampler = parse_sampler(given.sampler or "", module.sampler)
    export_program(module, given.out, given.weights)


_WRITERS = {"safetensors": _safetensors, "diffusers": _diffusers, "torch-export": _program}
