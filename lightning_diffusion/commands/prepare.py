"""prepare: what is computed once, before training."""

from __future__ import annotations

from typing import Any

from lightning_diffusion.commands.parser import Parser, run_action

HELP = """\
usage: lightning-diffusion prepare latents --config FILE --out FOLDER [--KEY VALUE ...]

Compute once, before training, what would else be computed in every step.

  latents       encode the images of `data` by the autoencoder of `model.representation`, onto the disk

lightning-diffusion prepare ACTION --help tells the options of each."""

_EXAMPLES = """\
  --config FILE         YAML with model and data, as for fit; several are merged, later ones win
  --model..., --data... any key of it, as for fit

FOLDER then holds the latents, the autoencoder's parameters, and latents.yaml, which goes after the other
configurations:
  lightning-diffusion prepare latents --config FILE --out latents
  lightning-diffusion fit --config FILE --config latents/latents.yaml"""


def run(command: str, arguments: list[str]) -> int:
    """Do what the first word says."""
    return run_action("prepare", arguments, _ACTIONS, HELP)


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


_ACTIONS: dict[str, Any] = {"latents": _latents}
