"""The options of guidance that commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_diffusion.commands.parser import Parser, refuse_missing

if TYPE_CHECKING:
    from lightning_diffusion.guidance import Guidance


def add_guidance(parser: Parser) -> None:
    """What goes with --guidance SCALE."""
    add = parser.add_argument
    add(
        "--guidance-interval",
        type=_interval,
        metavar="LOW,HIGH",
        help="levels sigma/alpha that are guided (all)",
    )
    add("--guidance-rescale", type=float, metavar="SHARE", help="of the unguided deviation, 0 to 1 (0)")
    add("--guide", metavar="PATH", help="run folder or checkpoint of a weaker model that guides")
    add("--guide-weights", metavar="WHICH", help="of that model, as --weights")


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH such as 0.3,3, found {text!r}") from None
    return low, high


def refuse_lonely(given: argparse.Namespace) -> None:
    """Options of guidance without a scale, and a guide that is not there."""
    options = ("guidance_interval", "guidance_rescale", "guide", "guide_weights")
    lonely = [name for name in options if getattr(given, name) is not None]
    if lonely and given.guidance is None:
        option = lonely[0].replace("_", "-")
        raise ValueError(f"--{option} needs a scale beside it: give --guidance SCALE, such as 2")
    if given.guide_weights is not None and given.guide is None:
        raise ValueError("--guide-weights was given without --guide: say which model guides")
    if given.guide is not None:
        refuse_missing("--guide", given.guide)


def guidance_of(given: argparse.Namespace, scale: float | None) -> Guidance | None:
    """The guidance that the options describe, at one scale; None without."""
    if scale is None:
        return None
    options: dict[str, Any] = {"interval": given.guidance_interval, "rescale": given.guidance_rescale or 0.0}
    if given.guide is None:
        from lightning_diffusion.guidance import ClassifierFree

        return ClassifierFree(scale, **options)
    from lightning_diffusion.autoguidance import AutoGuidance

    return AutoGuidance(given.guide, scale, weights=given.guide_weights, **options)
