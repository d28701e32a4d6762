"""`lightning-diffusion COMMAND ...`: finds the command; torch is imported only by those that compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning_diffusion import __version__

TRAINING = ("fit", "validate", "test", "predict")
COMMANDS = {
    "fit": "train a model from a configuration, into a new run folder; --resume goes on with one",
    "validate": "the validation loss of a checkpoint, on the held-out data",
    "test": "the same on the test data",
    "predict": "samples under the conditions of the data, as predictions.npz",
    "sample": "draw images from a checkpoint: a grid, arrays, or single files",
}

HELP = f"""usage: lightning-diffusion COMMAND [options]

{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

  lightning-diffusion fit --config configs/digits.yaml
  lightning-diffusion sample --checkpoint runs/digits-1 --num 64 --out grid.png
  lightning-diffusion COMMAND --help

  --version   print {__version__}
"""

TRAINING_HELP = """usage: lightning-diffusion {command} --config FILE.yaml [--option value ...]

{text}.

  --config FILE                     a YAML configuration; several are laid over each other, options win over all
  --resume RUN_OR_CHECKPOINT        (fit) go on exactly where a run stopped; options win over its configuration
  --name NAME                       (fit) the run folder is runs/NAME-n; by default the configuration's name
  --ckpt_path FILE                  (others) the checkpoint to evaluate
  --seed_everything N               seed of everything random
  --print_config                    print the resulting configuration and stop

What is trained (--model.X.help CLASS shows the options of a class)
  --model.network CLASS             UNet, or any nn.Module by its full path
  --model.network.image_shape '[3, 32, 32]'
  --model.network.channels 128
  --model.network.num_classes 10    0 without labels
  --model.objective CLASS           EDM, DDPM, VPrediction, or DiffusionObjective of single parts
  --model.representation CLASS      Identity, Standardize
  --model.sampler CLASS             Heun, Euler, DDIM, Ancestral
  --model.optimizer CLASS           any torch optimizer
  --model.optimizer.lr 1e-3
  --model.learning_rate CLASS       WarmupConstant, WarmupCosine, WarmupLinear, WarmupInverseSquareRoot
  --model.label_dropout 0.1         share of labels dropped, for guidance

On what
  --data CLASS                      DigitsDataModule, ImageFolderDataModule, GaussianMixtureDataModule
  --data.folder PATH                your own images
  --data.batch_size 64

How (all options of lightning.Trainer)
  --trainer.max_steps 10000
  --trainer.callbacks+ CLASS        PowerFunctionEMA, EMA, SampleGrid, any Lightning callback
  --trainer.precision bf16-mixed
  --trainer.devices 2
  --trainer.accumulate_grad_batches 4
  --trainer.log_every_n_steps 50

  lightning-diffusion {command} --help-all      every option there is
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that are the user's end with one line and status 2."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(__version__)
    elif command not in COMMANDS:
        nearest = get_close_matches(command, COMMANDS, 1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"Commands are {', '.join(COMMANDS)}."
        print(f"error: there is no command {command!r}. {hint}", file=sys.stderr)
        sys.exit(2)
    elif command in TRAINING and ({"-h", "--help"} & set(rest) or not rest):
        text = COMMANDS[command][0].upper() + COMMANDS[command][1:]
        print(TRAINING_HELP.format(command=command, text=text), end="")
    else:
        _run(command, rest)


def _run(command: str, rest: list[str]) -> None:
    module = "train" if command in TRAINING else command
    run = import_module(f"lightning_diffusion.commands.{module}").main
    if module == "train":
        rest = [command, *("--help" if option == "--help-all" else option for option in rest)]
    run(rest)
