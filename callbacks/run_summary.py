"""What a run is when it starts, and where everything is when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lightning_diffusion.io import CHECKPOINTS, LAST, folder_of


class RunSummary(Callback):
    """Print one line at the start of fit and the places of all results at its end, on standard output.

    When:   runs from the command line, which uses it; list it after what writes files.
    Costs:  nothing.
    """

    def __init__(self) -> None:
        self._began = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        _say(f"{_what(pl_module)}, on {trainer.strategy.root_device} in {trainer.precision}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.global_step:
            self._tell(
                trainer, "Stopped at", ("go on", f"lightning-diffusion fit --resume {folder_of(trainer)}")
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            sample = (
                f"lightning-diffusion sample --checkpoint {folder_of(trainer)} --num 64 --out samples.png"
            )
            self._tell(trainer, "Finished", ("draw more", sample))

    def _tell(self, trainer: Trainer, how: str, advice: tuple[str, str]) -> None:
        for logger in trainer.loggers:
            logger.save()
        seconds = time.monotonic() - self._began
        _say(f"{how} {trainer.global_step:,} steps after {seconds:.0f} s")
        rows = list(_places(folder_of(trainer)))
        for name, what in [*rows, *([advice] if dict(rows).get("checkpoint") else [])]:
            _say(f"  {name:<12}{what}")


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _what(pl_module: LightningModule) -> str:
    network = getattr(pl_module, "network", pl_module)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    objective = getattr(pl_module, "objective", None)
    trained = "" if objective is None else f" with {type(objective).__name__}"
    return f"Training {type(network).__name__}, {count / 1e6:.2f} M parameters,{trained}".rstrip(",")


def _places(folder: Path) -> Iterator[tuple[str, str]]:
    pictures = sorted((folder / "samples").glob("*.png"))
    found = {
        "picture": pictures[-1] if pictures else folder / "samples",
        "checkpoint": folder / CHECKPOINTS / LAST,
        "metrics": folder / "metrics.csv",
        "config": folder / "config.yaml",
    }
    return ((name, str(path)) for name, path in found.items() if path.exists())
