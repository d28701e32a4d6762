"""sample: draw images from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_diffusion.commands.errors import suggestion
from lightning_diffusion.commands.guiding import add_guidance, guidance_of, refuse_lonely
from lightning_diffusion.commands.parser import Parser, refuse_missing

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_diffusion.module import DiffusionModule
    from lightning_diffusion.sampling import Sampler

_EXAMPLES = """\
examples:
  lightning-diffusion sample --checkpoint runs/digits-1 --num 100 --out grid.png
  lightning-diffusion sample --checkpoint runs/digits-1 --num 50000 --out samples.npz --sampler heun:32
  lightning-diffusion sample --checkpoint runs/digits-1 --num 20 --out threes/ --label 3 --guidance 1.5"""


_IN_PYTHON = 'In Python: load_module(PATH).sample(N, {"context": embeddings}).'


def run(command: str, arguments: list[str]) -> int:
    """Draw images and write them."""
    given = _parser().parse(arguments)
    _refuse_impossible(given)
    from lightning_diffusion.commands.quiet import quiet
    from lightning_diffusion.commands.writing import format_of, refuse_existing, write_images

    out = Path(given.out)
    format_of(given.out)
    refuse_existing(out, given.overwrite)
    quiet()
    print(write_images(given.out, _drawn(given)), flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser("sample", "Draw images from a checkpoint.", _EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint")
    add("--num", type=int, default=64, metavar="N", help="how many images (64)")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help=".png: a grid; .npz: arrays images, labels; FOLDER/: single PNGs",
    )
    add("--label", type=_labels, action="extend", metavar="L[,L...]", help="classes to cycle through (all)")
    add("--sampler", metavar="NAME[:STEPS]", help="heun, dpm, euler, ddim, ancestral (the model's own)")
    add("--steps", type=int, metavar="N", help="steps of the sampler")
    add("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1 is off (1)")
    add_guidance(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    add(
        "--weights",
        metavar="WHICH",
        help="online, ema, ema:NAME, FILE.safetensors (ema where there are averages)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, ... (a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected class numbers such as 3 or 3,5, found {text!r}") from None


def _refuse_impossible(given: argparse.Namespace) -> None:
    refuse_missing("--checkpoint", given.checkpoint)
    refuse_lonely(given)
    if given.num < 1:
        raise ValueError(f"--num is {given.num}, expected 1 or more")
    if given.steps is not None and given.steps < 1:
        raise ValueError(f"--steps is {given.steps}, expected 1 or more")
    if given.steps is not None and ":" in (given.sampler or ""):
        raise ValueError(f"--steps {given.steps} and --sampler {given.sampler} both say how many: give one")


def _drawn(given: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels, with a bar if it takes long."""
    import torch

    from lightning_diffusion.averaging import full_name
    from lightning_diffusion.contexts import refuse_context

    module = load(given.checkpoint).to(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    refuse_context(module, "sample", _IN_PYTHON)
    labels = _cycled(given.label, given.num, module.num_classes)
    sampler = _sampler(given, module.sampler)
    weights = given.weights or ("ema" if module.averages else "online")
    guidance = guidance_of(given, given.guidance)
    condition = {"label": labels} if module.num_classes else None
    batches = module.sample_batches(given.num, condition, sampler, guidance, weights, given.seed)
    named = full_name(weights, module.averages)
    print(f"{given.num} images with {named} weights, {sampler}, seed {given.seed}", flush=True)
    yield from _with_bar(zip(batches, torch.split(labels, 256), strict=True), given.num)


def load(place: str) -> DiffusionModule:
    """The module in a run folder, checkpoint or exported file, on the CPU."""
    from lightning_diffusion.exported import load_module

    return load_module(place)


def _cycled(given: Sequence[int] | None, number: int, num_classes: int) -> Tensor:
    import torch

    if given and not num_classes:
        raise ValueError("--label was given, but this model was trained without classes")
    wrong = [label for label in given or [] if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--label {wrong[0]} is no class of this model: expected 0 to {num_classes - 1}")
    classes = torch.tensor(given or range(max(num_classes, 1)))
    return classes[torch.arange(number) % len(classes)]


def _sampler(given: argparse.Namespace, own: Sampler) -> Sampler:
    from dataclasses import replace

    chosen: Any = parse_sampler(given.sampler or "", own)
    sampler: Sampler = chosen if given.steps is None else replace(chosen, num_steps=given.steps)
    return sampler


def parse_sampler(text: str, own: Sampler) -> Sampler:
    """NAME or NAME:STEPS such as heun:18; of nothing the model's own."""
    from dataclasses import replace

    from lightning_diffusion.sampling import Sampler

    name, colon, steps = text.partition(":")
    known: dict[str, Any] = {kind.__name__.lower(): kind for kind in Sampler.__subclasses__()}
    known["dpm"] = known["dpmsolver2m"]
    if name and name.lower() not in known:
        raise ValueError(
            f"there is no sampler {name}{suggestion(name.lower(), known)} Known: {', '.join(known)}"
        )
    if colon and not (steps.isdecimal() and int(steps)):
        raise ValueError(f"sampler {text}: expected NAME:STEPS such as heun:18")
    sampler: Any = known[name.lower()]() if name else own
    chosen: Sampler = replace(sampler, num_steps=int(steps)) if steps else sampler
    return chosen


def _with_bar(batches: Iterator[tuple[Tensor, Tensor]], number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Nothing for what takes less than two seconds."""
    from lightning_diffusion.waiting import Waiting

    with Waiting(number, "images") as waiting:
        for images, labels in batches:
            waiting.advance(len(images))
            yield images, labels
