"""evaluate: figures of merit of a checkpoint, for weights, samplers and guidance."""

from __future__ import annotations

import argparse
from typing import Any

from lightning_diffusion.commands.guiding import add_guidance, refuse_lonely
from lightning_diffusion.commands.parser import Parser, refuse_missing

_EXAMPLES = """\
data: those of the run that the checkpoint is in, unless
  --data CLASS, --data.KEY VALUE
                        other data, or other arguments of them
  --config FILE         the `data` of a YAML file
features: of a classifier that is trained on the data's labels, unless
  --extractor CLASS, --extractor.KEY VALUE
                        InceptionFeatures, ModuleFeatures, or one of your own

examples:
  lightning-diffusion evaluate --checkpoint runs/digits-1 --weights ema,online
  lightning-diffusion evaluate --checkpoint runs/digits-1 --samplers heun:5,heun:9,heun:18,dpm:5,dpm:10,dpm:20
  lightning-diffusion evaluate --checkpoint runs/images-1 --num 50000 --extractor InceptionFeatures"""


def run(command: str, arguments: list[str]) -> int:
    """Evaluate and write the results."""
    parser = _parser()
    own, others = parser.parse_known_args(arguments)
    _refuse_impossible(own)
    from lightning_diffusion.commands.evaluating import evaluate

    options = [option for option in parser._option_string_actions if option.startswith("--")]
    evaluate(own, others, options)
    return 0


def _parser() -> Parser:
    parser = Parser("evaluate", "How good the images are that a checkpoint draws.", _EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint")
    add(
        "--weights",
        type=_words,
        metavar="W[,W...]",
        help="online, ema, ema:NAME, FILE.safetensors (ema, or online)",
    )
    add("--samplers", type=_words, metavar="S[,S...]", help="as heun:18,dpm:10,ddim:50 (the model's own)")
    add("--guidance", type=_numbers, metavar="G[,G...]", help="scales, as 1,1.5,2; 1 is off (1)")
    add_guidance(parser)
    add("--num", type=int, default=2000, metavar="N", help="samples each, some thousands (2000)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise, the same for all (0)")
    add("--out", metavar="FOLDER", help="for evaluation.csv, .json and .png (RUN/evaluation)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (a GPU where there is one)")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, found {text!r}")
    return words


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected scales such as 1,1.5,2, found {text!r}") from None


def _refuse_impossible(own: Any) -> None:
    refuse_missing("--checkpoint", own.checkpoint)
    refuse_lonely(own)
    if own.num < 10:
        raise ValueError(f"--num is {own.num}, expected 10 or more, better some thousands")
