"""Averages of a width relative to the training, chosen before or after it (Karras et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_diffusion.callbacks.ema import EMA
from lightning_diffusion.profiles import PowerFunction
from lightning_diffusion.recorder import Snapshots
from lightning_diffusion.snapshots import Storage


class PowerFunctionEMA(EMA):
    """An average as wide as `sigma_rel` of the training so far: no decay to adapt to the length of the run.

    When:   as EMA, and when the number of steps is not known beforehand.
    Knobs:  sigma_rel 0.05 to 0.15; larger is smoother and older (Karras et al. 2024).
    """

    def __init__(
        self,
        sigma_rel: float = 0.10,
        every_n_steps: int = 1,
        start_step: int = 0,
        only: list[str] | None = None,
    ) -> None:
        super().__init__(PowerFunction(sigma_rel), every_n_steps, start_step, only)


class PostHocEMA(EMA):
    """Snapshots of power-function averages, from which `lightning-diffusion ema` rebuilds one of any width.

    When:   the best length of the average is not known, which is the usual case (Karras et al. 2024).
    Costs:  as EMA for each width, and disk: 4 bytes per parameter, width and snapshot, 2.25 as differences. Files
            are written in the background; checkpoints wait for them.
    Knobs:  32 to 64 snapshots rebuild widths from 0.03 to 0.25 to about a thousandth.
    With:   one optimizer (choose its parameters with EMA(only=..., snapshots=Snapshots()) if there are several).

    Args:
        sigma_rels: widths of the averages that are kept; the first is the one that is evaluated.
        every_n_steps: optimizer steps between snapshots; a 64th of the run if not given.
        directory: where they go; `snapshots` in the run's folder if not given.
        storage: float32, difference or float16.
        keep: most times to keep, older ones thinned out; all if not given.
    """

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        every_n_steps: int | None = None,
        directory: str | None = None,
        storage: Storage = "float32",
        keep: int | None = None,
    ) -> None:
        profiles = {f"{sigma_rel:g}": PowerFunction(sigma_rel) for sigma_rel in sigma_rels}
        plan = Snapshots(every_n_steps, None if directory is None else str(directory), storage, keep)
        super().__init__(dict(profiles), snapshots=plan)
