"""Snapshots while a network is trained, written in the background.

A checkpoint waits for the snapshots before it, so that those of a run that was killed and resumed are all there;
a resumed run forgets the ones from after its checkpoint and writes them again.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_diffusion.averager import ModelAverages, whole
from lightning_diffusion.profiles import PowerFunction, Profile
from lightning_diffusion.snapshots import (
    BASE_EVERY,
    BYTES,
    Place,
    Storage,
    list_snapshots,
    remove_after,
    thin,
    write_snapshot,
)


@dataclass(frozen=True)
class Snapshots:
    """Keep the averages as they are every so many steps, to rebuild one of any width after training.

    Args:
        every_n_steps: optimizer steps between snapshots; a 64th of the run if not given.
        directory: where; `snapshots` in the run's folder if not given.
        storage: float32, difference (half the bytes, nearly the same error) or float16 (as published).
        keep: most times to keep, older ones thinned out; all if not given.
    """

    every_n_steps: int | None = None
    directory: str | None = None
    storage: Storage = "float32"
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in BYTES:
            raise ValueError(f"storage={self.storage!r} is not known: write one of {', '.join(BYTES)}.")
        if (self.every_n_steps is not None and self.every_n_steps < 1) or (self.keep or 2) < 2:
            raise ValueError(f"{self!r}: every_n_steps has to be at least 1 and keep at least 2.")
        if self.keep is not None and self.storage == "difference":
            raise ValueError("keep removes files that differences build on: write storage='float32' with it.")


def new_run() -> str:
    """An identity for a run."""
    return uuid.uuid4().hex


class Recorder:
    """Writes snapshots of averages as they move.

    Args:
        averages: those of power-function profiles, moved by one optimizer.
        place: where, and whose.
        every: steps between snapshots.
        keep: most times to keep.
        writes: whether this process is the one that writes.
    """

    def __init__(
        self, averages: ModelAverages, place: Place, every: int, keep: int | None = None, writes: bool = True
    ) -> None:
        self.averages, self.place, self.every, self.keep, self.writes = averages, place, every, keep, writes
        self.widths = widths_of(averages.profiles)
        self._last = averages.steps
        self._pool = ThreadPoolExecutor(1, "snapshots")
        self._pending: Future[None] | None = None
        if writes:
            self._take_over()

    def _take_over(self) -> None:
        """Go on in a folder of the same run, as it was at this step; leave another run's alone."""
        present = list_snapshots(self.place.folder) if self.place.folder.is_dir() else []
        if present and (present[0].run, present[0].network) != (self.place.run, self.place.network):
            raise ValueError(
                f"{self.place.folder} holds snapshots of another run. Give this one a directory of its own, or "
                "resume that run from its checkpoint."
            )
        remove_after(self.place.folder, self._last)

    def budget(self, total_steps: float) -> str:
        """What the snapshots of a run will take, in words."""
        elements = sum(p.numel() for p in self.averages.parameters.values())
        size = elements * len(self.widths) * BYTES[self.place.storage] / 1e6
        times = min(total_steps // self.every, self.keep or math.inf)
        taken = f", {times:g} x {size:.1f} MB = {times * size / 1e3:.2f} GB" if math.isfinite(times) else ""
        return f"Snapshots of {len(self.widths)} averages every {self.every} steps{taken}, in {self.place.folder}"

    def after_step(self) -> None:
        """Take a snapshot if one is due; forget those of steps that were taken back."""
        if self.averages.steps < self._last:
            self._rewind()
        if self.averages.steps // self.every > self._last // self.every:
            self._take()

    def _rewind(self) -> None:
        """Seen after the first step anew at the latest: that one's snapshot may be an old one, too."""
        self.flush()
        self._last = self.averages.steps - 1
        if self.writes:
            remove_after(self.place.folder, self._last)

    def finish(self) -> None:
        """Take a last one, and wait until all is written."""
        if self.averages.steps > self._last:
            self._take()
        self.flush()
        self.close()

    def close(self) -> None:
        """Let what is being written be finished."""
        self._pool.shutdown()

    def flush(self) -> None:
        """Wait for what is being written; an error there is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _take(self) -> None:
        self._last = step = self.averages.steps
        self.flush()
        copies = {name: self._copy(self.averages.averages[name]) for name in self.widths}
        if self.writes:
            times = {name: self.averages.time(name) for name in self.widths}
            self._pending = self._pool.submit(self._write, step, times, copies)

    def _copy(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU; all processes of a sharded average have to take part."""
        gathered = whole(average)
        return {key: x.to("cpu", copy=True) for key, x in gathered.items()} if self.writes else {}

    def _write(
        self, step: int, times: Mapping[str, float], averages: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        for name, sigma_rel in self.widths.items():
            base = self._base(step, sigma_rel)
            write_snapshot(self.place, step, times[name], sigma_rel, averages[name], base)
        if self.keep is not None:
            for snapshot in thin(list_snapshots(self.place.folder), self.keep):
                snapshot.path.unlink()

    def _base(self, step: int, sigma_rel: float) -> Path | None:
        number = step // self.every - 1
        path = self.place.path(number * self.every, sigma_rel)
        is_difference = self.place.storage == "difference" and number % BASE_EVERY
        return path if is_difference and path.is_file() else None


def widths_of(profiles: Mapping[str, Profile]) -> dict[str, float]:
    """Widths of power-function profiles by the averages' names; refuses others."""
    others = [repr(profile) for profile in profiles.values() if not isinstance(profile, PowerFunction)]
    if others:
        raise ValueError(
            f"Only power-function averages can be rebuilt in another width, not {', '.join(others)}. Write "
            'decay={"0.05": PowerFunction(0.05), "0.1": PowerFunction(0.1)}, or use PostHocEMA.'
        )
    return {name: p.sigma_rel for name, p in profiles.items() if isinstance(p, PowerFunction)}
