"""prepare: what is computed once, before training."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning_diffusion.commands.parser import Parser, run_action

HELP = """\
usage: lightning-diffusion prepare FOLDER OUT --image-size N [--latents CONFIG]
       lightning-diffusion prepare latents --config FILE --out FOLDER [--KEY VALUE ...]

Compute once, before training, what would else be computed in every step.

  FOLDER OUT    write images of any number, or their latents, in chunks, for StreamingDataModule, from a disk or a
                bucket; `prepare images FOLDER OUT` is the same
  latents       encode the images of `data` by the autoencoder of `model.representation`, for LatentsDataModule

lightning-diffusion prepare ACTION --help tells the options of each."""

_EXAMPLES = """\
  --config FILE         YAML with model and data, as for fit; several are merged, later ones win
  --model..., --data... any key of it, as for fit

FOLDER then holds the latents, the autoencoder's parameters, and latents.yaml, which goes after the other
configurations:
  lightning-diffusion prepare latents --config FILE --out latents
  lightning-diffusion fit --config FILE --config latents/latents.yaml"""

_IMAGES_EXAMPLES = """\
OUT is for StreamingDataModule, from there or from a bucket that it was copied to:
  lightning-diffusion prepare photos chunks --image-size 64
  lightning-diffusion fit --config FILE --data StreamingDataModule --data.folder chunks

With --latents it holds latents.yaml too, which goes after the other configurations:
  lightning-diffusion prepare photos chunks --image-size 64 --latents FILE
  lightning-diffusion fit --config FILE --config chunks/latents.yaml

Stopped in any way, the same command goes on where it was, and ends with the same files."""


def run(command: str, arguments: list[str]) -> int:
    """Do what the first word says; FOLDER OUT means images, also where a folder has the name of an action."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    if len(words) == 2 or (len(words) == 1 and words[0] not in _ACTIONS and Path(words[0]).is_dir()):
        arguments = ["images", *arguments]
    return run_action("prepare", arguments, _ACTIONS, HELP)


def _images(arguments: list[str]) -> None:
    parser = Parser("prepare images", "Write images, or their latents, in chunks.", _IMAGES_EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="of images, or of one sub-folder of them per class")
    add("out", metavar="OUT", help="what to write to")
    add(
        "--image-size",
        type=int,
        required=True,
        metavar="N",
        help="images are scaled to cover N x N, and cropped",
    )
    add("--channels", type=int, default=3, metavar="N", help="3 for colour, 1 for grey (3)")
    add(
        "--held-out", type=float, default=0.05, metavar="SHARE", help="of each class, never trained on (0.05)"
    )
    add("--skip-broken", action="store_true", help="leave out files that are no whole images")
    add(
        "--latents", action="append", metavar="CONFIG", help="encode by the autoencoder of this configuration"
    )
    add(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images that are read and encoded at once (64)",
    )
    add("--chunk-megabytes", type=int, default=64, metavar="N", help="about how large a file is (64)")
    add("--workers", type=int, metavar="N", help="processes that read images (one per core, at most 8)")
    add("--device", metavar="NAME", help="that encodes: cpu, cuda, ... (a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace what was prepared in another way")
    own = parser.parse(arguments)
    for name in ("image_size", "batch_size", "chunk_megabytes"):
        if getattr(own, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(own, name)}, expected 1 or more")
    from lightning_diffusion.commands.prepare_images import prepare

    prepare(own)


def _latents(arguments: list[str]) -> None:
    parser = Parser("prepare latents", "Encode images once, onto the disk.", _EXAMPLES)
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="what to write to")
    add("--batch-size", type=int, default=64, metavar="N", help="images that are encoded at once (64)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace the latents that are there")
    own, others = parser.parse_known_args(arguments)
    if own.batch_size < 1:
        raise ValueError(f"--batch-size is {own.batch_size}, expected 1 or more")
    from lightning_diffusion.commands.prepare_latents import prepare

    prepare(own, others, [option for option in parser._option_string_actions if option.startswith("--")])


_ACTIONS: dict[str, Any] = {"images": _images, "latents": _latents}
